"""Reading an AdapterBias, which is exactly a LoRA of rank 1 on every down_proj.

A layer adds `v (w . x)` to the output of its feed-forward part, x the input of down_proj: the LoRA
has a = w and b = v. The official code gives w a bias besides, which would add one vector to every
token; no LoRA does that, so such a file is refused.

Source: https://arxiv.org/abs/2205.00305; the names of the tensors are those of its code,
github.com/Allen0307/AdapterBias.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.tensor_file import read_tensors
from d2c_mlx.utils.errors import AdapterError

__all__ = ["ADAPTER_BIAS", "load_adapter_bias"]

ADAPTER_BIAS = "adapter_bias.safetensors"
_VECTOR, _SCORER = ".adapter_vector", ".adapter_alpha.weight"


def load_adapter_bias(directory: str | Path) -> Adapter:
    """Load the file `adapter_bias.safetensors` of a directory.

    It has for each layer `<path>.mlp.adapter_vector`, v `(out,)`, and
    `<path>.mlp.adapter_alpha.weight`, w `(1, in)`.

    Raises:
        AdapterError: it has a bias of the scorer, other tensors, or one without its partner.
    """
    path = Path(directory) / ADAPTER_BIAS
    parts: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, x in read_tensors(path).items():
        leaf = next((one for one in (_VECTOR, _SCORER) if name.endswith(one)), None)
        if leaf and x.size == max(x.shape):
            parts.setdefault(name.removesuffix(leaf), {})[leaf] = x.reshape(-1)
        elif name.endswith(".adapter_alpha.bias"):
            problems.append(
                f"{path}: {name}: a bias of the scorer adds one vector to every token, which no"
                " LoRA does; train it without (nn.Linear(..., bias=False))"
            )
        else:
            problems.append(
                f"{path}: {name} has shape {tuple(x.shape)}; expected only <layer>{_VECTOR} (out,)"
                f" and <layer>{_SCORER} (1, in)"
            )
    for layer, found in sorted(parts.items()):
        problems += [f"{path}: {layer}{leaf} is missing; save both tensors of every layer"
                     for leaf in (_VECTOR, _SCORER) if leaf not in found]  # fmt: skip
    if problems:
        raise AdapterError(problems)
    modules = {f"{layer}.down_proj": LoRA(found[_SCORER][:, None], found[_VECTOR][None])
               for layer, found in sorted(parts.items())}  # fmt: skip
    return Adapter(Path(directory).name, modules)
