"""Progress on standard error: bars on a terminal, and lines about a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


def say(text: str, quiet: bool = False) -> None:
    """Print a line on standard error, unless quiet."""
    if not quiet:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class Progress:
    """How far the work is, in tokens; a section has a bar, whose total is known from its start.

    `Progress()` shows nothing; what is counted outside a section is not shown either.
    """

    def __init__(self, shown: bool = False, unit: str = "tokens") -> None:
        """Show bars if `shown` and standard error is a terminal; they count `unit`."""
        self._console = Console(stderr=True)
        self.shown = shown and self._console.is_terminal
        self._unit = unit
        self._bar: tuple[Bars, TaskID] | None = None
        self._expected = 0

    @contextmanager
    def section(self, name: str, total: float = 0) -> Iterator[Self]:
        """Show a bar called `name` until the block ends, once there is work to expect.

        Its total is an estimate, which grows only if more than that is expected.
        """
        columns = (
            TextColumn("{task.description:<11}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + self._unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self._console, disable=not self.shown) as bars:
            self._bar, self._expected = (bars, bars.add_task(name, total=total, visible=False)), 0
            try:
                yield self
            finally:
                self._bar = None

    def expect(self, n_tokens: int) -> None:
        """Add work that is to come."""
        if self._bar:
            bars, bar = self._bar
            self._expected += n_tokens
            total = max(bars.tasks[0].total or 0, self._expected)
            bars.update(bar, total=total, visible=total > 0)

    def advance(self, n_tokens: float) -> None:
        """Count work as done."""
        if self._bar:
            bars, bar = self._bar
            bars.advance(bar, n_tokens)
