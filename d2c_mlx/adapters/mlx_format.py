"""Reading and checking an adapter directory of mlx-lm; `Adapter.save` writes one.

mlx-lm is lenient where mlx-swift is not: Swift takes the last `num_layers` blocks and traps on a
negative number, compares `keys` with paths inside a block, and throws on a tensor without a place.
Neither notices a factor that is missing or a key that matches nothing: the module then stays as it
is. Source: `LoRAContainer.swift`, https://github.com/ml-explore/mlx-swift-lm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.checks import DORA, BaseWeights, base_name, pair_problems, read_config
from d2c_mlx.adapters.tensor_file import open_tensors, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, collect, warn
from d2c_mlx.utils.parsing import is_positive

__all__ = ["layout_problems", "read_mlx"]

_TENSOR = re.compile(
    r"(?P<blocks>(?:.+?\.)?layers)\.(?P<block>\d+)\.(?P<key>.+)\.(?P<leaf>lora_[ab])"
)
_FLOATS = ("F16", "BF16", "F32")


def read_mlx(directory: Path, base: BaseWeights | None = None) -> Adapter:
    """Read mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`), see `read_adapter`.

    Args:
        directory: of the adapter.
        base: the base model's weights; with a `dora_rank` DoRAs become LoRAs, else they are
            refused.

    Raises:
        AdapterError: listing every problem of the directory.
    """
    config, where, file = read_config(directory), directory / CONFIG, directory / WEIGHTS
    parameters: Any = config.get("lora_parameters")
    stated: Any = parameters if isinstance(parameters, dict) else {}
    # mlx-lm before 0.19 and mlx-lm-lora have no fine_tune_type.
    old = "dora" if config.get("use_dora") or stated.get("use_dora") else "lora"
    kind = config.get("fine_tune_type") or old
    as_dora = kind == "dora" and base is not None and base.dora_rank is not None
    if kind != "lora" and not as_dora:
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    if not is_positive(stated.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, problems = {}, []
    for name, x in sorted(read_tensors(file).items()):
        path, _, leaf = name.rpartition(".")
        if as_dora and leaf == "m" and x.ndim == 1:
            magnitudes[path] = x
        elif leaf in ("lora_a", "lora_b") and x.ndim == 2:
            pairs.setdefault(path, {})[leaf] = x
        else:
            problems.append(
                f"{file}: {name} has shape {tuple(x.shape)}; expected only 2-dimensional"
                " <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
    problems += pair_problems(file, pairs, ("lora_a", "lora_b"), magnitudes if as_dora else None)
    if problems:
        raise AdapterError(problems)
    scale, rank = float(stated["scale"]), stated.get("rank")
    modules = {path: LoRA(p["lora_a"], p["lora_b"], scale) for path, p in sorted(pairs.items())}
    wrong = [path for path, lora in modules.items() if lora.rank != rank]
    if wrong:
        raise AdapterError(
            f"{where}: lora_parameters.rank is {rank}, but {wrong[0]} has rank"
            f" {modules[wrong[0]].rank}; mlx-lm could not load this adapter either"
        )
    alpha = stated.get("alpha")
    # mlx-lm 0.14.1 multiplied by alpha / rank too (`LoRALinear.__init__`); its files look alike.
    if "lora_layers" in config and is_positive(alpha) and alpha != rank:
        warn(
            f"{where}: scale is {scale:g}, as mlx-lm has had it since 0.14.2; if an older one"
            f" trained this, write {scale * alpha / rank:g}, its scale * alpha / rank"
        )
    adapter = Adapter(directory.name, modules, base_name(config))
    return base.to_lora(adapter, magnitudes) if base is not None and as_dora else adapter


def layout_problems(directory: Path, shown: Path | None = None) -> list[str]:
    """List every rule that an adapter directory breaks, one line each; no numbers are read.

    For directories that others load. `read_adapter` checks an adapter against its base model.

    Args:
        directory: holds `adapters.safetensors` and `adapter_config.json`.
        shown: its path in messages; None is its own path.
    """
    shown = shown or directory
    errors: list[InputError] = []

    def header() -> dict[str, tuple[str, tuple[int, ...]]]:
        with open_tensors(directory / WEIGHTS) as file:
            return file.header

    config, tensors = collect(errors, lambda: read_config(directory)), collect(errors, header)
    problems = [line for error in errors for line in error.problems]
    if config is not None:
        problems += [f"{shown / CONFIG}: {line}" for line in _config_problems(config)]
    if tensors is not None:
        problems += [f"{shown / WEIGHTS}: {line}" for line in _tensor_problems(tensors)]
    if not problems and config is not None and tensors is not None:
        shapes = {name: shape for name, (_, shape) in tensors.items()}
        problems += [f"{shown}: {line}" for line in _disagreements(config, shapes)]
    return problems


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    def positive(value: object) -> bool:
        return type(value) is int and value > 0

    def finite(value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)

    kind, n_layers, parameters = map(
        config.get, ("fine_tune_type", "num_layers", "lora_parameters")
    )
    problems = []
    if kind != "lora":
        problems.append(f"fine_tune_type is {kind!r}, expected 'lora'")
    if not positive(n_layers):
        problems.append(
            f"num_layers is {n_layers!r}, expected the number of transformer blocks; mlx-swift"
            " traps on -1 and adapts no block at 0"
        )
    if not isinstance(parameters, dict):
        return [*problems, f"lora_parameters is {parameters!r}, expected an object"]
    keys = parameters.get("keys")
    good_keys = isinstance(keys, list) and keys and all(isinstance(k, str) and k for k in keys)
    for name, good, expected in (
        ("rank", positive(parameters.get("rank")), "a whole number above 0"),
        ("scale", finite(parameters.get("scale")), "a number"),
        ("dropout", finite(parameters.get("dropout")), "a number"),
        ("keys", good_keys, "a list of module paths inside a block"),
    ):
        if not good:
            value = parameters.get(name)
            problems.append(f"lora_parameters.{name} is {value!r}, expected {expected}")
    return problems


def _tensor_problems(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    if not header:
        return ["holds no tensors"]
    outside = {name for name, (_, shape) in header.items()
               if len(shape) != 2 or not _TENSOR.fullmatch(name)}  # fmt: skip
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
    names = {name.rpartition(".")[0] for name in header.keys() - outside}
    half = [name for name in names if not {f"{name}.lora_a", f"{name}.lora_b"} <= header.keys()]
    if half:
        problems.append(
            f"{len(half)} modules have one factor of two (first: {min(half)}); no runtime would"
            " notice"
        )
    return problems


def _disagreements(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List what a config says and its tensors deny, both of them well formed."""
    n_layers, keys = config["num_layers"], set(config["lora_parameters"]["keys"])
    rank = config["lora_parameters"]["rank"]
    parts = {name: match for name in sorted(shapes) if (match := _TENSOR.fullmatch(name))}
    axis = {"lora_a": 1, "lora_b": 0}
    problems = []
    wrong = [name for name, match in parts.items() if shapes[name][axis[match["leaf"]]] != rank]
    if wrong:
        problems.append(
            f"lora_parameters.rank is {rank}, but {wrong[0]} has shape {shapes[wrong[0]]};"
            " expected lora_a (in, rank) and lora_b (rank, out), one rank for all modules"
        )
    used = {match["key"] for match in parts.values()}
    for what, unmatched in (
        ("lora_parameters.keys does not name", used - keys),
        ("no tensor belongs to lora_parameters.keys", keys - used),
    ):
        if unmatched:
            problems.append(
                f"{what} {', '.join(sorted(unmatched))}; expected paths inside a block, such as"
                " self_attn.q_proj, and each with tensors"
            )
    last = max(int(match["block"]) for match in parts.values())
    if last >= n_layers:
        problems.append(
            f"num_layers is {n_layers}, but tensors belong to block {last}; expected the base"
            " model's number of blocks"
        )
    blocks = sorted({match["blocks"] for match in parts.values()})
    if len(blocks) > 1:
        problems.append(f"blocks of {' and '.join(blocks)}; expected those of one model")
    return problems
