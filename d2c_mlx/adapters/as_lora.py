"""Adapters that are no LoRA but become one: AdapterBias exactly, a DoRA as the closest.

In an AdapterBias a layer adds `v (w . x)` to the output of its feed-forward part, x the input of
down_proj: the LoRA has a = w and b = v. The official code gives w a bias besides, which would add
one vector to every token; no LoRA does that, so such a file is refused. Source:
https://arxiv.org/abs/2205.00305; the names of the tensors are those of its code,
github.com/Allen0307/AdapterBias.

A DoRA gives the rows of W + s B A learned lengths m. On a given base that is an addition,
dW = diag(m / |W + s B A|) (W + s B A) - W with the length of each row, but one of full rank.
Source: https://arxiv.org/abs/2402.09353, as in PEFT's `tuners/lora/dora.py` and mlx-lm's
`tuner/dora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import best_factors
from d2c_mlx.adapters.tensor_file import read_tensors
from d2c_mlx.utils.errors import AdapterError

__all__ = ["ADAPTER_BIAS", "BaseWeights", "load_adapter_bias"]

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
        if leaf and x.size == max(x.shape, default=0):
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


@dataclass(frozen=True)
class BaseWeights:
    """The base model's weights, one at a time.

    Attributes:
        weight: module path -> its weight in float32, dequantized, `(out, in)` of a linear module;
            None where the base has no such module.
        dora_rank: rank of the LoRA that a DoRA becomes; None refuses DoRAs.
    """

    weight: Callable[[str], mx.array | None]
    dora_rank: int | None = None

    def holds(self, path: str, stored: mx.array) -> bool:
        """True if a module that an adapter stores in full is the base's, in the dtype stored."""
        own = self.weight(path)
        return own is not None and mx.array_equal(own.astype(stored.dtype), stored).item() is True

    def to_lora(self, dora: Adapter, magnitudes: Mapping[str, mx.array]) -> Adapter:
        """The LoRA of `dora_rank` that is closest to a DoRA, in the dtype of its factors.

        Modules that the base has not, or has in another shape, stay as they are: `check_adapter`
        refuses them.

        Args:
            dora: its factors alone.
            magnitudes: module path -> m `(out,)`.

        Returns:
            The adapter, with its `dora_error`.
        """
        modules, lost, total = dict(dora.modules), 0.0, 0.0
        for path, lora in dora.modules.items():
            weight = self.weight(path)
            if weight is None or weight.shape != lora.shape[::-1]:
                continue
            delta = _delta(np.array(weight), lora, np.array(magnitudes[path].astype(mx.float32)))
            a, b = best_factors(delta, self.dora_rank or 1)
            kind = lora.a.dtype
            modules[path] = LoRA(mx.array(a).astype(kind), mx.array(b).astype(kind))
            lost += float(np.square(modules[path].delta() - delta).sum(dtype=np.float64))
            total += float(np.square(delta).sum(dtype=np.float64))
        return replace(dora, modules=modules, dora_error=(lost / total) ** 0.5 if total else 0.0)


def _delta(weight: np.ndarray, lora: LoRA, magnitude: np.ndarray) -> np.ndarray:
    """The update `(out, in)` of one module of a DoRA."""
    whole = weight + lora.delta()
    length = np.linalg.norm(whole, axis=1)
    # A row of zeros has no direction, and stays.
    return whole * (magnitude / np.where(length > 0, length, 1))[:, None] - weight
