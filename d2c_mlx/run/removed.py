"""Options of a run that are gone, and what to use in their place."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REMOVED", "REMOVED_VALUES", "Removed"]


@dataclass(frozen=True)
class Removed:
    """An option that is gone.

    Attributes:
        default: what it was unless it was given; a run directory of before has it in its config.
        instead: what to do, to follow "no longer an option; ".
    """

    default: object
    instead: str

    def __str__(self) -> str:
        return f"no longer an option; {self.instead}"


# YAML key, and option with dashes -> what to say.
REMOVED = {
    "compile": Removed(False, "leave it out: blocks are evaluated without mx.compile"),
    "rounds": Removed(10, "leave it out: a start of the paper's loop takes at most 10 rounds"),
    "restarts": Removed(1, "leave it out: the starts table and kmeans need one draw each; another"
                        " --seed draws others"),
}  # fmt: skip
# Key -> value that is gone -> what to say.
REMOVED_VALUES = {
    "init": {
        name: f"{name!r} is no longer a start; use table, kmeans or both, which end in better"
        " clusters (benchmarks/pages/ablations.md)"
        for name in ("adapters", "random", "pairs")
    }
}
