"""Options of a run that were removed, and what to use instead."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REMOVED", "REMOVED_VALUES", "Removed"]


@dataclass(frozen=True)
class Removed:
    """A removed option.

    Attributes:
        default: its former default, which the configs of older runs hold.
        instead: what to do instead; the message continues "no longer an option; " with it.
    """

    default: object
    instead: str

    def __str__(self) -> str:
        return f"no longer an option; {self.instead}"


# YAML key (the command-line option has dashes) -> message.
REMOVED = {
    "compile": Removed(False, "leave it out: blocks are evaluated without mx.compile"),
    "rounds": Removed(10, "leave it out: a start of the paper's loop takes at most 10 rounds"),
    "restarts": Removed(1, "leave it out: the starts table and kmeans need one draw each; another"
                        " --seed draws others"),
}  # fmt: skip
# YAML key -> removed value -> message.
REMOVED_VALUES = {
    "init": {
        name: f"{name!r} is no longer a start; use table, kmeans or both, which end in better"
        " clusters (benchmarks/pages/ablations.md)"
        for name in ("adapters", "random", "pairs")
    }
}
