"""Checking that an adapter directory loads in stock mlx-lm and in mlx-swift.

mlx-lm is lenient where mlx-swift is not: Swift takes the last `num_layers` blocks and traps on a
negative number, compares `keys` with paths inside a block, and throws on a tensor without a place.
Neither notices a factor that is missing or a key that matches nothing: the module then stays as it
is.

Source: `LoRAContainer.swift`, https://github.com/ml-explore/mlx-swift-lm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.adapters.adapter_config import read_config
from d2c_mlx.adapters.tensor_file import Header, read_header
from d2c_mlx.utils.errors import InputError, collect

__all__ = ["layout_problems"]

_TENSOR = re.compile(
    r"(?P<blocks>(?:.+?\.)?layers)\.(?P<block>\d+)\.(?P<key>.+)\.(?P<leaf>lora_[ab])"
)
_FLOATS = ("F16", "BF16", "F32")


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
