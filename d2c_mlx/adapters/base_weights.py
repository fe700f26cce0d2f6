"""What only the base model's own numbers tell of an adapter: DoRAs, and modules stored in full.

A DoRA gives the rows of W + s B A learned lengths m. On a given base that is an addition,
dW = diag(m / |W + s B A|) (W + s B A) - W with the length of each row, but one of full rank.

Source: DoRA, https://arxiv.org/abs/2402.09353, as in PEFT's `tuners/lora/dora.py` and mlx-lm's
`tuner/dora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import best_factors

__all__ = ["BaseWeights"]


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
