"""Names of the merges, without what makes them, so that options can list them at no cost."""

from __future__ import annotations

__all__ = ["AUTO_METHODS", "MERGE_METHODS", "RUN_METHODS"]

# The rows of `methods.METHODS`; a test compares.
MERGE_METHODS = (
    "linear", "ties", "dare-linear", "dare-ties", "emr", "tsv", "knots", "iso-c", "iso-cts",
    "regmean", "wudi", "lego", "concat", "factor-linear",
)  # fmt: skip
# Those of a run; the last three ask the model, so `Merger` makes them.
RUN_METHODS = (*MERGE_METHODS, "regmean++", "layerwise", "auto")
# What "auto" tries on every cluster beside the default, the simplest first: it wins ties.
AUTO_METHODS = ("linear", "ties", "tsv", "knots", "iso-c", "wudi")
