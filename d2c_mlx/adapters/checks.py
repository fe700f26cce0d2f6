"""Parts that all readers of adapters share: the config, checks, DoRAs as LoRAs.

A DoRA gives the rows of W + s B A learned lengths m. On a given base that is an addition,
dW = diag(m / |W + s B A|) (W + s B A) - W with the length of each row, but one of full rank.
Source: https://arxiv.org/abs/2402.09353, as in PEFT's `tuners/lora/dora.py` and mlx-lm's
`tuner/dora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import CONFIG, Adapter, LoRA
from d2c_mlx.adapters.core_space import best_factors
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "DORA",
    "BaseWeights",
    "base_key",
    "base_name",
    "read_config",
    "stated_base",
    "check_adapter",
    "check_base",
    "norm_bounds",
    "pair_problems",
]

# How names of models end that hold another's weights in another precision or file.
_PRECISION = re.compile(
    r"[-_.](unsloth|bnb|mlx|gguf|gptq|awq|dwq|\d-?bits?|int[48]|fp8|b?fp?16|fp32|float(16|32)|"
    r"i?q\d(_\w+)?)$"
)


class OtherBaseError(AdapterError):
    """An adapter does not fit the base model; `base` is the name of its own, if it has one."""

    def __init__(self, problems: list[str], base: str | None) -> None:
        super().__init__(problems)
        self.base = base


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
    bounds = norm_bounds(adapter)
    large = [module for module, bound in bounds.items() if not bound <= _MAX_NORM]
    if large:
        problems.append(
            f"{path}: {len(large)} modules change their weight beyond reason (first: {large[0]}:"
            f" norm up to {bounds[large[0]]:.1e}, at most {_MAX_NORM:.0e} is read); look at its"
            " scale (alpha), or train it again"
        )
    if wrong or any(".layers." in module for module in unknown):
        raise OtherBaseError(problems, adapter.base)
    if problems:
        raise AdapterError(problems)


def norm_bounds(adapter: Adapter) -> dict[str, float]:
    """Module path -> an upper bound of the Frobenius norm of its dW, without forming dW.

    The bound is the sum of the norms of the components.
    """
    bounds = []
    for lora in adapter.modules.values():
        a, b = lora.a.astype(mx.float32), lora.b.astype(mx.float32)
        columns, rows = mx.sqrt(mx.square(a).sum(axis=0)), mx.sqrt(mx.square(b).sum(axis=1))
        bounds.append(lora.scale * (columns * rows).sum())
    values: Any = mx.stack(bounds).tolist()  # a GPU is waited for once
    return dict(zip(adapter.modules, values))


def pair_problems(
    path: Path,
    pairs: Mapping[str, Mapping[str, mx.array]],
    leaves: tuple[str, str],
    magnitudes: Mapping[str, mx.array] | None = None,
) -> list[str]:
    """Factors that are missing, empty or of two ranks, one line per module; and bad magnitudes.

    Args:
        path: the file to name in messages.
        pairs: module path -> leaf -> factor, the first leaf `(in, r)`, the second `(r, out)`.
        leaves: names of the two factors in this format, such as `lora_A` and `lora_B`.
        magnitudes: module path -> m `(out,)` of a DoRA; None of a LoRA.
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
    if magnitudes is not None:
        whole = {module: pair for module, pair in pairs.items() if leaves[1] in pair}
        expected = {module: pair[leaves[1]].shape[1:] for module, pair in whole.items()}
        shapes = {module: m.shape for module, m in magnitudes.items()}
        modules = sorted(pairs.keys() | shapes.keys())
        wrong = [m for m in modules if m not in shapes or shapes[m] != expected.get(m)]
        if wrong:
            problems.append(
                f"{path}: {len(wrong)} modules have no magnitude for each output, or no factors"
                f" (first: {wrong[0]}); save the DoRA again"
            )
    return problems


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


def read_config(directory: Path) -> dict[str, object]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        AdapterError: it is missing, or no JSON object.
    """
    path = directory / CONFIG
    try:
        config = parse_json(read_text(path))
    except FileNotFoundError:
        raise AdapterError(f"{path}: missing; an adapter needs its adapter_config.json") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def stated_base(config: Mapping[str, object]) -> str:
    """The base model as a config states it, a path whole; empty if it states none."""
    return str(config.get("base_model_name_or_path") or config.get("model") or "")


def base_name(config: Mapping[str, object]) -> str | None:
    """The base model's name as a config states it; None if it states none.

    Only the last part is kept of a path: the rest tells who trained the adapter, and a pack would
    carry it on.

    Args:
        config: an `adapter_config.json`, of PEFT or mlx-lm.
    """
    name = stated_base(config)
    # A path and no hub id: absolute, in a home directory, ./ or ../, an address, or of Windows.
    if name.startswith(("/", "~", ".")) or {":", "\\"} & set(name):
        parts = [part for part in re.split(r"[/\\:]", name) if part.strip(".")]
        name = parts[-1] if parts and parts[-1][0] != "~" else ""
    return name or None


def base_key(name: str | None) -> str | None:
    """The base model's name without owner and precision, in small letters; None stays None.

    `unsloth/Llama-3.2-1B-bnb-4bit` and `mlx-community/Llama-3.2-1B-4bit` are one.
    """
    key = name and name.rpartition("/")[2].lower()
    while key and (shorter := _PRECISION.sub("", key)) not in ("", key):
        key = shorter
    return key


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
            stored = self.weight(path)
            if stored is None or stored.shape != lora.shape[::-1]:
                continue
            weight, magnitude = np.array(stored), np.array(magnitudes[path].astype(mx.float32))
            whole = weight + lora.delta()
            length = np.linalg.norm(whole, axis=1)
            # A row of zeros has no direction, and stays.
            delta = whole * (magnitude / np.where(length > 0, length, 1))[:, None] - weight
            a, b = best_factors(delta, self.dora_rank or 1)
            kind = lora.a.dtype
            modules[path] = LoRA(mx.array(a).astype(kind), mx.array(b).astype(kind))
            lost += float(np.square(modules[path].delta() - delta).sum(dtype=np.float64))
            total += float(np.square(delta).sum(dtype=np.float64))
        return replace(dora, modules=modules, dora_error=(lost / total) ** 0.5 if total else 0.0)
