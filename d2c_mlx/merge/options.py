"""Names of the merge methods, and the options that they share.

This file imports nothing heavy: the command line and a run's config name the methods without MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NEED_ROWS", "READ_ANSWERS", "RUN_METHODS", "MergeOptions"]

# Those of `methods.METHODS`, and two that ask the model, which `Merger` makes.
RUN_METHODS = ("linear", "ties", "tsv", "regmean", "regmean++", "layerwise")
# Those that look at calibration rows.
NEED_ROWS = ("regmean", "regmean++", "layerwise")
# Those that also read adapters' answers to prompts beside the rows; None is the default.
READ_ANSWERS = (None, "layerwise")


@dataclass(frozen=True)
class MergeOptions:
    """Options for merging the adapters of a cluster into one.

    Attributes:
        method: one of `RUN_METHODS` or a plug-in; None takes the best that the model allows.
        rank: largest rank of a merge; None takes the largest of the adapters.
        seed: seed of all random choices.
    """

    method: str | None = None
    rank: int | None = None
    seed: int = 0
