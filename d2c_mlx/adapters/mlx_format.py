"""Reading and checking an adapter directory of mlx-lm; `Adapter.save` writes one.

mlx-lm is lenient where mlx-swift is not: Swift takes the last `num_layers` blocks and traps on a
negative number, compares `keys` with paths inside a block, and throws on a tensor without a place.
Neither notices a factor that is missing or a key that matches nothing: the module then stays as it
is. Source: `LoRAContainer.swift`, https://github.com/ml-explore/mlx-swift-lm.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.checks import DORA, DoraBase, base_name, pair_problems, read_config
from d2c_mlx.adapters.tensor_file import FLOATS, open_tensors, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, collect
from d2c_mlx.utils.parsing import is_positive

_TENSOR = re.compile(r"(?P<blocks>(.+?\.)?layers)\.(?P<block>\d+)\.(?P<key>.+)\.lora_[ab]")


def read_mlx(directory: Path, dora: DoraBase | None = None) -> Adapter:
    """Read mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`), see `read_adapter`.

    Raises:
        AdapterError: listing every problem of the directory.
    """
    config, where, file = read_config(directory), directory / CONFIG, directory / WEIGHTS
    stated = config.get("lora_parameters")
    stated = stated if isinstance(stated, dict) else {}
    # mlx-lm before 0.19 and mlx-lm-lora have no fine_tune_type.
    old = "dora" if config.get("use_dora") or stated.get("use_dora") else "lora"
    kind = config.get("fine_tune_type") or old
    dora = dora if kind == "dora" else None
    if kind != "lora" and dora is None:
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    if not is_positive(stated.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, problems = {}, []
    for name, x in sorted(read_tensors(file).items()):
        path, _, leaf = name.rpartition(".")
        if dora and leaf == "m" and x.ndim == 1:
            magnitudes[path] = x
        elif leaf in ("lora_a", "lora_b") and x.ndim == 2:
            pairs.setdefault(path, {})[leaf] = x
        else:
            problems.append(
                f"{file}: {name} has shape {tuple(x.shape)}; expected only 2-dimensional"
                " <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
    problems += pair_problems(file, pairs, ("lora_a", "lora_b"), magnitudes if dora else None)
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
    adapter = Adapter(directory.name, modules, base_name(config))
    return dora.to_lora(adapter, magnitudes) if dora else adapter


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
    if config is None or header is None:
        return [line for error in errors for line in error.problems]
    shapes = {name: shape for name, (_, shape) in header.items()}
    places = {name: match for name, shape in shapes.items()
              if len(shape) == 2 and (match := _TENSOR.fullmatch(name))}  # fmt: skip
    if not places:
        return [f"{(shown or directory) / WEIGHTS}: holds no tensors of a LoRA"]
    inside = sorted({place["key"] for place in places.values()})
    last = max(int(place["block"]) for place in places.values())
    ranks = {shapes[name][name.endswith("a")] for name in places}
    modules = {name.rpartition(".")[0] for name in places}
    half = modules - {m for m in modules if {f"{m}.lora_a", f"{m}.lora_b"} <= shapes.keys()}
    outside, dtypes = shapes.keys() - places.keys(), {dtype for dtype, _ in header.values()}
    blocks, n_layers = {place["blocks"] for place in places.values()}, config.get("num_layers")
    stated: Any = config.get("lora_parameters")
    stated = stated if isinstance(stated, dict) else {}
    keys = stated.get("keys")
    rules = [
        (CONFIG, "fine_tune_type", config.get("fine_tune_type") == "lora", "'lora'",
         config.get("fine_tune_type")),
        (CONFIG, "num_layers", type(n_layers) is int and n_layers > last,
         f"the base model's number of blocks, above {last}: mlx-swift traps on -1", n_layers),
        (CONFIG, "lora_parameters.rank", [json.dumps(stated.get("rank"))] == [*map(str, ranks)],
         f"the rank of all tensors, which is {sorted(ranks)}", stated.get("rank")),
        (CONFIG, "lora_parameters.keys",
         isinstance(keys, list) and sorted(set(map(str, keys))) == inside,
         f"the paths inside a block that have tensors: {inside}", keys),
        *((CONFIG, f"lora_parameters.{name}", type(stated.get(name)) in (int, float), "a number",
           stated.get(name)) for name in ("scale", "dropout")),
        (WEIGHTS, "tensors", not outside, "only two-dimensional"
         " <...>.layers.<n>.<module>.lora_a and .lora_b", sorted(outside)[:1]),
        (WEIGHTS, "dtypes", len(dtypes) == 1 and dtypes <= set(FLOATS),
         f"one of {', '.join(FLOATS)}", sorted(dtypes)),
        (WEIGHTS, "modules", not half, "both factors of each", sorted(half)[:1]),
        (WEIGHTS, "blocks", len(blocks) == 1, "those of one model", sorted(blocks)),
    ]  # fmt: skip
    return [f"{(shown or directory) / file}: {field} is {value!r}, expected {expected}"
            for file, field, good, expected, value in rules if not good]  # fmt: skip
