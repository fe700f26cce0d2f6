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
    errors: list[InputError] = []

    def read_header() -> dict[str, tuple[str, tuple[int, ...]]]:
        with open_tensors(directory / WEIGHTS) as file:
            return file.header

    config, header = collect(errors, lambda: read_config(directory)), collect(errors, read_header)
    problems = [line for error in errors for line in error.problems]
    if config is None or header is None:
        return problems
    rules = _rules(config, header) if header else [(WEIGHTS, False, "holds no tensors")]
    return [f"{(shown or directory) / file}: {line}" for file, good, line in rules if not good]


def _rules(
    config: Mapping[str, Any], header: Mapping[str, tuple[str, tuple[int, ...]]]
) -> list[tuple[str, bool, str]]:
    """The file that a rule is about, whether it is kept, and what is wrong if not."""
    shapes = {name: shape for name, (_, shape) in header.items()}
    flat = [name for name in sorted(shapes) if len(shapes[name]) == 2]
    places = {name: match for name in flat if (match := _TENSOR.fullmatch(name))}
    outside = shapes.keys() - places.keys()
    modules = {name.rpartition(".")[0] for name in places}
    half = [m for m in modules if not {f"{m}.lora_a", f"{m}.lora_b"} <= shapes.keys()]
    dtypes = sorted({dtype for dtype, _ in header.values()})
    blocks = sorted({place["blocks"] for place in places.values()})
    last = max((int(place["block"]) for place in places.values()), default=0)
    inside = sorted({place["key"] for place in places.values()})
    kind, n_layers = config.get("fine_tune_type"), config.get("num_layers")
    stated: Any = config.get("lora_parameters")
    stated = stated if isinstance(stated, dict) else {}
    rank, keys = stated.get("rank"), stated.get("keys")
    numbers = stated.get("scale"), stated.get("dropout")
    ranks = {name: shapes[name][place["leaf"] == "lora_a"] for name, place in places.items()}
    wrong = next((name for name, r in ranks.items() if type(rank) is not int or r != rank), None)
    listed = keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else []
    return [
        (CONFIG, kind == "lora", f"fine_tune_type is {kind!r}, expected 'lora'"),
        (CONFIG, type(n_layers) is int and n_layers > last,
         f"num_layers is {n_layers!r}, but tensors belong to block {last}; expected the base"
         " model's number of blocks: mlx-swift traps on -1 and adapts no block at 0"),
        (CONFIG, wrong is None,
         f"lora_parameters.rank is {rank!r}, but {wrong} has shape {shapes.get(wrong or '')};"
         " expected lora_a (in, rank) and lora_b (rank, out), one rank for all modules"),
        (CONFIG, sorted(set(listed)) == inside,
         f"lora_parameters.keys is {keys!r}, expected the paths inside a block that have tensors:"
         f" {', '.join(inside)}"),
        *((CONFIG, type(x) in (int, float) and math.isfinite(x),
           f"lora_parameters.{name} is {x!r}, expected a number")
          for name, x in zip(("scale", "dropout"), numbers)),
        (WEIGHTS, not outside,
         f"{len(outside)} tensors are no two-dimensional <...>.layers.<n>.<module>.lora_a or"
         f" .lora_b (first: {min(outside, default=None)}); mlx-swift adapts linear modules inside"
         " transformer blocks only"),
        (WEIGHTS, len(dtypes) == 1 and dtypes[0] in _FLOATS,
         f"dtypes {', '.join(dtypes)}, expected one of {', '.join(_FLOATS)} for all tensors: the"
         " base's activations'"),
        (WEIGHTS, not half,
         f"{len(half)} modules have one factor of two (first: {min(half, default=None)}); no"
         " runtime would notice"),
        (WEIGHTS, len(blocks) < 2,
         f"blocks of {' and '.join(blocks)}; expected those of one model"),
    ]  # fmt: skip
