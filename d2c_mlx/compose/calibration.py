"""Learnable calibration: a small projection corrects a merge, for two adapters that act at once.

The merge is frozen. Beside it works one pair P1, P2 per type of module, shared by all layers (the
variant ++), trained on rows of the joint task. `fold` makes a plain LoRA of both. The variant that
trains a bias instead has no LoRA form and is not here.

Source: https://arxiv.org/abs/2507.16083, https://arxiv.org/abs/2510.13848. Neither says where P
starts; here the update does at zero, as a LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.train import Trainer, as_adapter, as_factors, new_lora
from d2c_mlx.evaluate.distill import Factors
from d2c_mlx.models.examples import ExampleSet

__all__ = ["calibrate", "fold"]

# Rank of a projection, as published.
_RANK = 4


def fold(merge: Factors, projections: Factors) -> Factors:
    """The factors of the merge and of the projection of its type, side by side.

    Args:
        merge: module path -> a `(1, in, r)`, b `(1, r, out)`.
        projections: type of module -> P1 `(1, in, s)`, P2 `(1, s, out)`.

    Returns:
        Module path -> a `(1, in, r + s)`, b `(1, r + s, out)`; no number is changed.
    """
    folded = {}
    for path, (a, b) in merge.items():
        p1, p2 = projections[_kind(path, a, b)]
        folded[path] = mx.concatenate([a, p1], axis=2), mx.concatenate([b, p2], axis=1)
    return folded


def calibrate(trainer: Trainer, merge: Adapter, rows: ExampleSet, rank: int = _RANK) -> Adapter:
    """Train the projections of a merge on rows of the joint task, and fold them.

    Args:
        trainer: trains them.
        merge: of the two adapters.
        rows: prompts with answers that need both.
        rank: s, of every projection.

    Returns:
        One LoRA whose rank is that of the merge + s.
    """
    frozen = as_factors(merge)
    shapes: Mapping[str, tuple[int, int]] = {
        _kind(path, a, b): (a.shape[1], b.shape[2]) for path, (a, b) in frozen.items()
    }
    start = as_factors(new_lora("", shapes, rank, trainer.options.seed))
    found = trainer.fit(start, lambda projections: fold(frozen, projections), rows)
    return as_adapter(merge.name, fold(frozen, found))


def _kind(path: str, a: mx.array, b: mx.array) -> str:
    """The type of a module: its path within a block, and its shape, which may differ by layer."""
    inner = path.split(".layers.")[1].partition(".")[2]
    return f"{inner} {a.shape[1]} {b.shape[2]}"
