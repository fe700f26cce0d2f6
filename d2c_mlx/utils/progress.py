"""Progress bars on standard error, with the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar", "progress_bar"]


class Bar:
    """One bar whose total grows as work becomes known; an `evaluator.Meter`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._known = self._foreseen = 0

    def foresee(self, n_tokens: int) -> None:
        """Set the estimate of the work that is not expected yet; replaces the one before."""
        self._foreseen = n_tokens
        self._show()

    def expect(self, n_tokens: int) -> None:
        """Add work that is certain to come; it is taken from the estimate."""
        self._known += n_tokens
        self._foreseen = max(0, self._foreseen - n_tokens)
        self._show()

    def _show(self) -> None:
        total = self._known + self._foreseen
        self._progress.update(self._task, total=total, visible=total > 0)

    def advance(self, n_tokens: int) -> None:
        """Count work as done."""
        self._progress.advance(self._task, n_tokens)


@contextmanager
def progress_bar(name: str, quiet: bool = False) -> Iterator[Bar]:
    """Show a bar on standard error once there is work to expect.

    Args:
        name: text before the bar.
        quiet: show nothing.
    """
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        yield Bar(progress, progress.add_task(name, total=0, visible=False))
