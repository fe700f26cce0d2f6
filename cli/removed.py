"""Removed commands and options, with their replacements; d2c_mlx/run/removed.py has a run's."""

from __future__ import annotations

__all__ = ["COMMANDS", "OPTIONS", "instead"]

_HISTORY = "keep the output of --json, in a file for each result: --json > result.json"
# (command, option) -> what to do.
OPTIONS = {
    ("add", "--threshold"): "leave it out: an adapter gets a slot of its own while there is one,"
    " and --budget N says how many there are",
    ("bench", "--history"): _HISTORY,
    ("phone", "--history"): _HISTORY,
}
# Two words of a command line -> what to do.
COMMANDS = {("bench", "compare"): "compare the two files of --json with any tool for JSON"}


def instead(command: str, option: str) -> str | None:
    """The message for an option that a command no longer has; None if it never had it."""
    said = OPTIONS.get((command, option))
    if said:
        return f"{option}: no longer an option; {said}"
    # Imported only after an error, because help must not import the library.
    from d2c_mlx.run.removed import REMOVED

    gone = REMOVED.get(option.lstrip("-").removeprefix("no-").replace("-", "_"))
    return f"{option}: {gone}" if gone else None
