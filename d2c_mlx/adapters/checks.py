"""Checks of an adapter that every reader makes, whatever the format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.utils.errors import AdapterError

__all__ = [
    "DORA",
    "check_adapter",
    "check_base",
    "check_finite",
    "magnitude_problems",
    "pair_problems",
]


class OtherBaseError(AdapterError):
    """An adapter does not fit the base model; `base` is the name of its own, if it has one."""

    base: str | None = None


# Why a DoRA is refused, of PEFT or mlx-lm.
DORA = (
    "a DoRA scales each row of the merged weight, the base's own numbers too, by a learned"
    " magnitude: the update is no low-rank addition, so it cannot be merged or packed exactly;"
    " run and convert take it in as a LoRA, and show the error, with --accept-dora RANK"
)
# model_type of base models whose weights mlx-lm multiplies as it loads them: B A of the stored
# weights is not dW of the loaded ones, and the factor differs by module.
_RESCALED = frozenset({"falcon_h1"})
_RESCALED_NAME = re.compile(r"falcon[-_ ]?h1", re.IGNORECASE)
# Norm of an update beyond which an adapter is refused. Weights have norms of a few hundred; and far
# above, merges and their scales would leave float16.
_MAX_NORM = 1e6


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Check every module of an adapter against its base model, and how large its updates are.

    Args:
        adapter: what was read from `path`.
        shapes: module path -> (in, out) of the base model's linear modules.
        path: the file to name in messages.

    Raises:
        AdapterError: modules that the base has not, shapes of another base, or updates whose norm
            is beyond any use; a line for each of the three.
    """
    problems = []
    unknown = [module for module in adapter.modules if module not in shapes]
    if unknown:
        problems.append(
            f"{path}: {len(unknown)} modules are no linear layer of a transformer block of the"
            f" base model (first: {unknown[0]}); embeddings, lm_head, experts and vision parts"
            " cannot carry a LoRA that every runtime loads; train it without them"
        )
    wrong = [m for m, lora in adapter.modules.items() if m in shapes and lora.shape != shapes[m]]
    if wrong:
        first = wrong[0]
        problems.append(
            f"{path}: {len(wrong)} modules have the shape of another base model; first: {first}:"
            f" found in, out = {adapter.modules[first].shape}, expected {shapes[first]}"
            f" (the adapter names base {adapter.base!r})"
        )
    bounds = adapter.norm_bounds()
    large = [module for module, bound in bounds.items() if not bound <= _MAX_NORM]
    if large:
        problems.append(
            f"{path}: {len(large)} modules change their weight beyond reason (first: {large[0]}:"
            f" norm up to {bounds[large[0]]:.1e}, at most {_MAX_NORM:.0e} is read); look at its"
            " scale (alpha), or train it again"
        )
    if wrong or any(".layers." in module for module in unknown):
        error = OtherBaseError(problems)
        error.base = adapter.base
        raise error
    if problems:
        raise AdapterError(problems)


def check_finite(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Refuse tensors with NaN or infinity.

    Args:
        tensors: name -> numbers.
        path: the file to name in messages.

    Raises:
        AdapterError: how many tensors hold them, and the first.
    """
    # Asked for together: a GPU is waited for once, not once per tensor.
    each = [mx.isfinite(x).all() for x in tensors.values()]
    finite: Any = mx.stack(each).tolist() if each else []
    bad = [name for name, good in zip(tensors, finite) if not good]
    if bad:
        raise AdapterError(
            f"{path}: {len(bad)} tensors hold NaN or infinity (first: {min(bad)}); train it again"
        )


def pair_problems(
    path: Path, pairs: Mapping[str, Mapping[str, mx.array]], leaves: tuple[str, str]
) -> list[str]:
    """Factors that are missing, empty or of two ranks, one line per module.

    Args:
        path: the file to name in messages.
        pairs: module path -> leaf -> factor, the first leaf `(in, r)`, the second `(r, out)`.
        leaves: names of the two factors in this format, such as `lora_A` and `lora_B`.
    """
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


def magnitude_problems(
    path: Path,
    pairs: Mapping[str, Mapping[str, mx.array]],
    magnitudes: Mapping[str, mx.array],
    leaf: str,
) -> list[str]:
    """Magnitudes of a DoRA that are missing, of no module or of another length, in one line.

    Args:
        path: the file to name in messages.
        pairs: as for `pair_problems`.
        magnitudes: module path -> m `(out,)`.
        leaf: name of the factor `(r, out)`.
    """
    wrong = [
        module
        for module in sorted(pairs.keys() | magnitudes.keys())
        if module not in magnitudes
        or magnitudes[module].shape != pairs.get(module, {leaf: mx.array(0)})[leaf].shape[1:]
    ]
    if not wrong:
        return []
    return [
        f"{path}: {len(wrong)} modules have no magnitude for each output, or no factors (first:"
        f" {wrong[0]}); save the DoRA again"
    ]


def check_base(where: Path, config: Mapping[str, Any] | None, name: str | None = None) -> None:
    """Refuse a base model for whose LoRAs PEFT and GGUF mean another dW than mlx-lm.

    Call it before a PEFT or GGUF adapter is read or written; MLX's own layout needs no such check.

    Args:
        where: the file or directory to name in messages.
        config: the base model's config.json.
        name: the base model's name, looked at only without a config.

    Raises:
        AdapterError: mlx-lm multiplies that model's weights as it loads them.
    """
    kind = (config or {}).get("model_type")
    if kind in _RESCALED:
        base = f"the base model's model_type is {kind!r}"
    elif config is None and name and _RESCALED_NAME.search(name):
        base = f"the base model is {name!r}"
    else:
        return
    raise AdapterError(
        f"{where}: {base}: mlx-lm folds this model's multipliers into its weights, so a LoRA means"
        " another dW in PEFT and GGUF; use adapters in MLX's format only"
    )
