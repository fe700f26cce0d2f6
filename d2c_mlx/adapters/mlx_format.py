"""Reading an adapter directory of mlx-lm, and what every reader of adapters checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.parsing import parse_json, positive

__all__ = [
    "DORA",
    "base_of",
    "check_adapter",
    "check_finite",
    "load_adapter",
    "pair_problems",
    "read_config",
    "read_tensors",
]


# Why a DoRA is refused, of PEFT or mlx-lm.
DORA = (
    "a DoRA scales each row of the merged weight, the base's own numbers too, by a learned"
    " magnitude: the update is no low-rank addition, so it cannot be merged or packed exactly"
)
# Norm of an update beyond which an adapter is refused. Weights have norms of a few hundred; and far
# above, merges and their scales would leave float16.
_MOST = 1e6


def read_config(directory: Path) -> dict[str, object]:
    """Read `adapter_config.json`; raises AdapterError when it is missing or no JSON object."""
    path = directory / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: missing; an adapter needs its adapter_config.json") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file. Raises AdapterError when truncated, corrupt or not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        # safe_open checks that the header's offsets lie within the file; mx.load alone is lazy.
        with safe_open(str(path), framework="numpy") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        # MLX has no float64, and says no more than that.
        double = [name for name, dtype in dtypes.items() if dtype == "F64"]
        if double:
            raise AdapterError(
                f"{path}: {len(double)} tensors are in float64 (first: {min(double)}), which MLX"
                " does not have; save the adapter in float16, bfloat16 or float32"
            )
        tensors: Any = mx.load(str(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(
            f"{path}: truncated or not a safetensors file ({reason}); copy it again"
        ) from None
    if not dtypes:
        raise AdapterError(f"{path}: holds no tensors")
    whole = [name for name, x in tensors.items() if not mx.issubdtype(x.dtype, mx.floating)]
    if whole:
        raise AdapterError(
            f"{path}: {len(whole)} tensors hold no floating point numbers (first: {min(whole)},"
            f" {tensors[min(whole)].dtype}); save the adapter in float16, bfloat16 or float32"
        )
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Raises AdapterError when a tensor of the file `path` holds NaN or infinity."""
    # Asked for together: a GPU is waited for once, not once per tensor.
    each = [mx.isfinite(x).all() for x in tensors.values()]
    finite: Any = mx.stack(each).tolist() if each else []
    bad = [name for name, good in zip(tensors, finite) if not good]
    if bad:
        raise AdapterError(
            f"{path}: {len(bad)} tensors hold NaN or infinity (first: {min(bad)}); train it again"
        )


def load_adapter(directory: Path) -> Adapter:
    """Load mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`).

    Raises:
        AdapterError: listing every problem of the directory.
    """
    config = read_config(directory)
    where = directory / CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not positive(parameters.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    weights = read_tensors(directory / WEIGHTS)
    pairs: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, x in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b") or x.ndim != 2:
            problems.append(
                f"{directory / WEIGHTS}: {name} has shape {tuple(x.shape)}; expected only"
                " 2-dimensional <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
        else:
            pairs.setdefault(path, {})[leaf] = x
    problems += pair_problems(directory / WEIGHTS, pairs, ("lora_a", "lora_b"))
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
    return Adapter(directory.name, modules, base_of(config))


def base_of(config: Mapping[str, object]) -> str | None:
    """The base model's name as a config states it; of a path that is no hub id the last part.

    The rest tells who trained the adapter, and a pack would carry it on.
    """
    name = str(config.get("base_model_name_or_path") or config.get("model") or "")
    # Absolute, a home directory, ./ or ../, an address, or of Windows.
    if name.startswith(("/", "~", ".")) or {":", "\\"} & set(name):
        parts = [part for part in re.split(r"[/\\:]", name) if part.strip(".")]
        name = parts[-1] if parts and parts[-1][0] != "~" else ""
    return name or None


def pair_problems(
    path: Path, pairs: Mapping[str, Mapping[str, mx.array]], leaves: tuple[str, str]
) -> list[str]:
    """Problems of a set of factor pairs given as `a (in, r)` and `b (r, out)`, one line each."""
    problems = []
    for module, pair in sorted(pairs.items()):
        missing = [leaf for leaf in leaves if leaf not in pair]
        if missing:
            problems.append(f"{path}: {module} has no {missing[0]}; both factors are needed")
            continue
        a, b = (pair[leaf] for leaf in leaves)
        if 0 in (*a.shape, *b.shape):
            problems.append(f"{path}: {module} is empty: shapes {a.shape}, {b.shape}")
        elif a.shape[1] != b.shape[0]:
            problems.append(
                f"{path}: {module}: {leaves[0]} has rank {a.shape[1]}, {leaves[1]} {b.shape[0]}"
            )
    return problems


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Check every module against the base model.

    Args:
        adapter: what was read from `path`.
        shapes: module path -> (in, out) of the base model's linear modules.
        path: the file to name in messages.

    Raises:
        AdapterError: unknown modules, shapes of another base, or updates beyond any use: tensor,
            found, expected.
    """
    problems = []
    unknown = [module for module in adapter.modules if module not in shapes]
    if unknown:
        problems.append(
            f"{path}: {len(unknown)} modules are no linear layer of a transformer block of the"
            f" base model (first: {unknown[0]}); embeddings, lm_head and experts cannot carry a"
            " LoRA that every runtime loads"
        )
    wrong = [m for m, lora in adapter.modules.items() if m in shapes and lora.shape != shapes[m]]
    if wrong:
        first = wrong[0]
        problems.append(
            f"{path}: {len(wrong)} modules have the shape of another base model; first: {first}:"
            f" found in, out = {adapter.modules[first].shape}, expected {shapes[first]}"
            f" (the adapter names base {adapter.base!r})"
        )
    bounds = adapter.bounds()
    large = [module for module, bound in bounds.items() if not bound <= _MOST]
    if large:
        problems.append(
            f"{path}: {len(large)} modules change their weight beyond reason (first: {large[0]}:"
            f" norm up to {bounds[large[0]]:.1e}, at most {_MOST:.0e} is read); look at its scale"
            " (alpha), or train it again"
        )
    if problems:
        raise AdapterError(problems)
