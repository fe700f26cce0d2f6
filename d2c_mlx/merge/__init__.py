"""Merge adapters on dW, whatever their ranks and target modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.errors import ConfigError
from d2c_mlx.merge.core import factorise, to_core
from d2c_mlx.merge.methods import linear, ties

__all__ = ["METHODS", "merge_adapters", "scaled"]

METHODS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"linear": linear, "ties": ties}


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str = "linear",
    density: float = 0.5,
    rank: int | None = None,
) -> Adapter:
    """Merge into one adapter, defined on dW and truncated to `rank`.

    A module that some adapters do not have counts as a zero update of those. The order of
    `adapters` does not matter. One adapter is returned as it is.

    Args:
        adapters: at least one, all of the same base model.
        method: a key of `METHODS`.
        density: share of entries kept, for methods that trim.
        rank: of the result; None takes the largest rank of `adapters`.

    Returns:
        float32 factors with scale 1, named after the sorted members.

    Raises:
        ConfigError: unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"merge_method: {method!r} is unknown; expected one of {list(METHODS)}")
    adapters = sorted(adapters, key=lambda adapter: (adapter.name, adapter.digest))
    names = tuple(adapter.name for adapter in adapters)
    if len(adapters) == 1:
        only = adapters[0]
        return Adapter(only.name, only.modules, only.base, only.sources or names)
    rank = rank or max(adapter.rank for adapter in adapters)
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    modules = {
        path: _merge_module(
            [adapter.modules.get(path) for adapter in adapters], method, density, rank
        )
        for path in paths
    }
    return Adapter("+".join(names), modules, adapters[0].base, names)


def _merge_module(loras: Sequence[LoRA | None], method: str, density: float, rank: int) -> LoRA:
    shape = next(lora.shape for lora in loras if lora is not None)
    nothing = np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32)
    q_a, q_b, cores = to_core([lora.factors() if lora else nothing for lora in loras])
    a, b = factorise(METHODS[method](cores, density), q_a, q_b, rank)
    return LoRA(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)))


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The same adapter with dW times `scale`, the scale folded into b."""
    modules = {
        path: LoRA(lora.a, lora.b.astype(mx.float32) * (scale * lora.scale))
        for path, lora in adapter.modules.items()
    }
    return Adapter(adapter.name, modules, adapter.base, adapter.sources)
