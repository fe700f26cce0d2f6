"""How to merge: the methods by name, and the options that they share.

Light on purpose: the command line and the config of a run name the methods without importing MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AUTO_METHODS", "MERGE_METHODS", "RUN_METHODS", "MergeOptions"]

# The keys of `methods.METHODS`; a test compares.
MERGE_METHODS = (
    "linear", "ties", "dare-linear", "dare-ties", "emr", "tsv", "knots", "iso-c", "iso-cts",
    "regmean", "wudi", "lego", "concat", "factor-linear",
)  # fmt: skip
# The last three ask the model, so `Merger` makes them.
RUN_METHODS = (*MERGE_METHODS, "regmean++", "layerwise", "auto")
# What "auto" tries on every cluster beside the default, the simplest first: it wins ties.
AUTO_METHODS = ("linear", "ties", "tsv", "knots", "iso-c", "wudi")


@dataclass(frozen=True)
class MergeOptions:
    """How the adapters of a cluster become one.

    Attributes:
        method: one of `RUN_METHODS`; None is the best that the base model allows.
        density: share of entries kept by methods that sparsify, above 0 and at most 1.
        scale: of every merge's dW; None tunes it per cluster on the calibration rows.
        rank: largest rank of a merge; None is the largest of the adapters.
        eps: a merge is made again only while its regret falls by more.
        seed: of all random choices.
    """

    method: str | None = None
    density: float = 0.5
    scale: float | None = None
    rank: int | None = None
    eps: float = 1e-3
    seed: int = 0
