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
    "restarts": Removed(1, "leave it out: another --seed draws others"),
    "init": Removed(["table", "kmeans"], "leave it out: estimates need no start, and the paper's"
                    " loop takes all that it has"),
    "patience": Removed(10, "leave it out: the search ends when its proposals fail"),
    "neighbours": Removed(32, "leave it out: no task is measured under other adapters any more"),
}  # fmt: skip
# YAML key -> removed value -> message.
REMOVED_VALUES = {
    "search": {
        "moves": "'moves' is no longer a search; leave it out: estimates find clusters as good in a"
        " tenth of the evaluations (benchmarks/notes/2026-11-29-estimates.md)"
    }
}
