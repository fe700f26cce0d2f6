"""Reading and checking an adapter directory of mlx-lm; `Adapter.save` writes one.

mlx-lm is lenient where mlx-swift is not: Swift takes the last `num_layers` blocks and traps on a
negative number, compares `keys` with paths inside a block, and throws on a tensor without a place.
Neither notices a factor that is missing or a key that matches nothing: the module then stays as it
is. Source: `LoRAContainer.swift`, https://github.com/ml-explore/mlx-swift-lm.

An AdapterBias is read here too: a layer adds `v (w . x)` to the output of its feed-forward part, x
the input of down_proj, so the LoRA has a = w and b = v. The official code gives w a bias besides,
which would add one vector to every token; no LoRA does that, so such a file is refused. Source:
https://arxiv.org/abs/2205.00305; the names of the tensors are those of its code,
github.com/Allen0307/AdapterBias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.checks import (
    DORA,
    BaseWeights,
    base_name,
    magnitude_problems,
    pair_problems,
    read_config,
)
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS
from d2c_mlx.adapters.tensor_file import Header, Layout, read_header, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, collect, warn
from d2c_mlx.utils.parsing import is_positive

__all__ = ["ADAPTER_BIAS", "MLX_LAYOUT", "layout_problems", "load_adapter", "load_adapter_bias"]

MLX_LAYOUT = Layout("{}.lora_a", "{}.lora_b", transposed=False)
ADAPTER_BIAS = "adapter_bias.safetensors"
_VECTOR, _SCORER = ".adapter_vector", ".adapter_alpha.weight"
_TENSOR = re.compile(
    r"(?P<blocks>(?:.+?\.)?layers)\.(?P<block>\d+)\.(?P<key>.+)\.(?P<leaf>lora_[ab])"
)
_FLOATS = ("F16", "BF16", "F32")


def load_adapter(directory: str | Path, base: BaseWeights | None = None) -> Adapter:
    """Load mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`).

    `read_adapter` recognises a layout by itself and checks the adapter against its base.

    Args:
        directory: of the adapter.
        base: the base model's weights; with a `dora_rank` DoRAs become LoRAs, else they are
            refused.

    Raises:
        AdapterError: listing every problem of the directory.
    """
    directory = Path(directory)
    if (directory / PEFT_WEIGHTS).exists() and not (directory / WEIGHTS).exists():
        raise AdapterError(
            f"{directory}: PEFT's layout, expected mlx-lm's; use d2c_mlx.read_adapter, or convert"
            f" it with d2c-mlx convert --adapters {directory} --output DIR"
        )
    config = read_config(directory)
    where = directory / CONFIG
    parameters = config.get("lora_parameters")
    kind = _kind(config, parameters)
    as_dora = kind == "dora" and base is not None and base.dora_rank is not None
    if kind != "lora" and not as_dora:
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    if not isinstance(parameters, dict) or not is_positive(parameters.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    weights = read_tensors(directory / WEIGHTS)
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, problems = {}, []
    for name, x in sorted(weights.items()):
        path, _, leaf = name.rpartition(".")
        if as_dora and leaf == "m" and x.ndim == 1:
            magnitudes[path] = x
        elif leaf not in ("lora_a", "lora_b") or x.ndim != 2:
            problems.append(
                f"{directory / WEIGHTS}: {name} has shape {tuple(x.shape)}; expected only"
                " 2-dimensional <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
        else:
            pairs.setdefault(path, {})[leaf] = x
    problems += pair_problems(directory / WEIGHTS, pairs, ("lora_a", "lora_b"))
    if as_dora:
        problems += magnitude_problems(directory / WEIGHTS, pairs, magnitudes, "lora_b")
    if problems:
        raise AdapterError(problems)
    scale = float(parameters["scale"])
    modules = {path: LoRA(p["lora_a"], p["lora_b"], scale) for path, p in sorted(pairs.items())}
    rank = parameters.get("rank")
    wrong = [path for path, lora in modules.items() if lora.rank != rank]
    if wrong:
        raise AdapterError(
            f"{where}: lora_parameters.rank is {rank}, but {wrong[0]} has rank"
            f" {modules[wrong[0]].rank}; mlx-lm could not load this adapter either"
        )
    _warn_of_alpha(config, parameters, where)
    adapter = Adapter(directory.name, modules, base_name(config))
    return base.to_lora(adapter, magnitudes) if base is not None and as_dora else adapter


def _kind(config: Mapping[str, object], parameters: object) -> object:
    """`lora`, `dora` or `full`; mlx-lm before 0.19 and mlx-lm-lora tell it elsewhere."""
    inner = parameters if isinstance(parameters, dict) else {}
    old = "dora" if config.get("use_dora") or inner.get("use_dora") else "lora"
    return config.get("fine_tune_type") or old


def _warn_of_alpha(
    config: Mapping[str, object], parameters: Mapping[str, Any], where: Path
) -> None:
    """Warn of a scale that means something else in mlx-lm's first versions, whose files look alike.

    Source: `LoRALinear.__init__` in mlx-lm 0.14.1 and 0.14.2, https://github.com/ml-explore/mlx-lm.
    """
    alpha, rank, scale = (parameters.get(name, 0) for name in ("alpha", "rank", "scale"))
    if "lora_layers" in config and is_positive(alpha) and alpha != rank:
        warn(
            f"{where}: scale is {scale:g}, as mlx-lm has had it since 0.14.2; if an older one"
            f" trained this, write {scale * alpha / rank:g}, its scale * alpha / rank"
        )


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


def layout_problems(directory: Path, shown: Path | None = None) -> list[str]:
    """List every rule that an adapter directory breaks, one line each; no numbers are read.

    For directories that others load. `read_adapter` checks an adapter against its base model.

    Args:
        directory: holds `adapters.safetensors` and `adapter_config.json`.
        shown: its path in messages; None is its own path.
    """
    shown = shown or directory
    errors: list[InputError] = []
    config = collect(errors, lambda: read_config(directory))
    header = collect(errors, lambda: read_header(directory / WEIGHTS))
    problems = [line for error in errors for line in error.problems]
    if config is not None:
        problems += [f"{shown / CONFIG}: {line}" for line in _config_problems(config)]
    if header is not None:
        problems += [f"{shown / WEIGHTS}: {line}" for line in _tensor_problems(header)]
    if not problems and config is not None and header is not None:
        problems += [f"{shown}: {line}" for line in _disagreements(config, header)]
    return problems


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _config_problems(config: Mapping[str, object]) -> list[str]:
    kind, n_layers = config.get("fine_tune_type"), config.get("num_layers")
    problems = []
    if kind != "lora":
        problems.append(f"fine_tune_type is {kind!r}, expected 'lora'")
    if not _is_positive_int(n_layers):
        problems.append(
            f"num_layers is {n_layers!r}, expected the number of transformer blocks; mlx-swift"
            " traps on -1 and adapts no block at 0"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        return [*problems, f"lora_parameters is {parameters!r}, expected an object"]
    keys = parameters.get("keys")
    good_keys = isinstance(keys, list) and keys and all(isinstance(k, str) and k for k in keys)
    for name, good, expected in (
        ("rank", _is_positive_int(parameters.get("rank")), "a whole number above 0"),
        ("scale", _is_finite(parameters.get("scale")), "a number"),
        ("dropout", _is_finite(parameters.get("dropout")), "a number"),
        ("keys", good_keys, "a list of module paths inside a block"),
    ):
        if not good:
            found = parameters.get(name)
            problems.append(f"lora_parameters.{name} is {found!r}, expected {expected}")
    return problems


def _tensor_problems(header: Header) -> list[str]:
    if not header:
        return ["holds no tensors"]
    outside = [name for name, (_, shape) in header.items()
               if len(shape) != 2 or not _TENSOR.fullmatch(name)]  # fmt: skip
    problems = []
    if outside:
        problems.append(
            f"{len(outside)} tensors are no two-dimensional <...>.layers.<n>.<module>.lora_a or"
            f" .lora_b (first: {min(outside)}); mlx-swift adapts linear modules inside transformer"
            " blocks only"
        )
    dtypes = sorted({dtype for dtype, _ in header.values()})
    if len(dtypes) > 1 or dtypes[0] not in _FLOATS:
        problems.append(
            f"dtypes {', '.join(dtypes)}, expected one of {', '.join(_FLOATS)} for all tensors: the"
            " base's activations'"
        )
    names = {name.rpartition(".")[0] for name in header.keys() - set(outside)}
    half = [name for name in names if not {f"{name}.lora_a", f"{name}.lora_b"} <= header.keys()]
    if half:
        problems.append(
            f"{len(half)} modules have one factor of two (first: {min(half)}); no runtime would"
            " notice"
        )
    return problems


def _disagreements(config: Mapping[str, object], header: Header) -> list[str]:
    """List what a config says and its tensors deny, both of them well formed."""
    parameters: dict[str, object] = config["lora_parameters"]  # type: ignore[assignment]
    keys, rank = parameters["keys"], parameters["rank"]
    parts = {name: match for name in sorted(header) if (match := _TENSOR.fullmatch(name))}
    problems = []
    axis = {"lora_a": 1, "lora_b": 0}
    wrong = [name for name, match in parts.items() if header[name][1][axis[match["leaf"]]] != rank]
    if wrong:
        problems.append(
            f"lora_parameters.rank is {rank}, but {wrong[0]} has shape {header[wrong[0]][1]};"
            " expected lora_a (in, rank) and lora_b (rank, out), one rank for all modules"
        )
    used = {match["key"] for match in parts.values()}
    for what, unmatched in (
        ("lora_parameters.keys does not name", used - set(keys)),  # type: ignore[call-overload]
        ("no tensor belongs to lora_parameters.keys", set(keys) - used),  # type: ignore[call-overload]
    ):
        if unmatched:
            problems.append(
                f"{what} {', '.join(sorted(unmatched))}; expected paths inside a block, such as"
                " self_attn.q_proj, and each with tensors"
            )
    last = max(int(match["block"]) for match in parts.values())
    if last >= config["num_layers"]:  # type: ignore[operator]
        problems.append(
            f"num_layers is {config['num_layers']}, but tensors belong to block {last}; expected"
            " the base model's number of blocks"
        )
    blocks = sorted({match["blocks"] for match in parts.values()})
    if len(blocks) > 1:
        problems.append(f"blocks of {' and '.join(blocks)}; expected those of one model")
    return problems
