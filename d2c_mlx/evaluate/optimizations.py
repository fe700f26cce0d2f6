"""The engine's optimizations, each of which can be turned off."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Optimizations"]


@dataclass(frozen=True)
class Optimizations:
    """Switches of the engine's optimizations; each changes a loss by rounding only.

    `--without NAME` turns one off. The field names are part of every cache key.

    Attributes:
        head: compute logits at target positions only.
        prefix: run the tokens that all rows of a set begin with once per adapter.
        batches: run several rows at once, sorted by length; else row by row.
        frozen: run the blocks below the first that an adapter changes once per set.
        fold: add float32 adapters to copies of the weights; else compute them beside the weights.
        streams: on a CPU device evaluate one set per core side by side; else one set on all cores.
        exponentials: on a CPU device use the faster exponentials of `models/kernels.py`.
        stack: adapters in one batch.
    """

    head: bool = True
    prefix: bool = True
    batches: bool = True
    frozen: bool = True
    fold: bool = True
    streams: bool = True
    exponentials: bool = True
    stack: int = 1
