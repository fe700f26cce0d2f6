"""Progress on standard error: bars on a terminal, else a line now and then; and a log file."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar", "progress_bar", "say"]

# Seconds between two lines where no terminal can show a bar.
_EVERY = 30.0
_log = logging.getLogger("d2c_mlx")


def say(text: str, quiet: bool = False) -> None:
    """Print a line on standard error, unless quiet; `--log-file` has it in any case."""
    _log.info(text)
    if not quiet:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


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
def _lines(name: str, progress: Progress, quiet: bool, every: float, unit: str) -> Iterator[None]:
    """Say how far the work is, every some seconds, and in the end how long it took."""
    done, started = threading.Event(), time.monotonic()

    def elapsed() -> timedelta:
        return timedelta(seconds=int(time.monotonic() - started))

    def tell() -> None:
        while not done.wait(every):
            (task,) = progress.tasks
            known = f"{task.completed:,.0f} of {task.total or 0:,.0f} {unit}, "
            say(f"{name}: {known if task.visible else ''}{elapsed()}", quiet)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"{name}: done, {elapsed()}", quiet)


@contextmanager
def progress_bar(
    name: str, quiet: bool = False, every: float = _EVERY, unit: str = "tokens"
) -> Iterator[Bar]:
    """Show a bar on standard error once there is work to expect; without a terminal, lines.

    Args:
        name: text before the bar.
        quiet: show nothing.
        every: seconds between two lines.
        unit: what the bar counts.
    """
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        bar = Bar(progress, progress.add_task(name, total=0, visible=False))
        with _lines(name, progress, quiet or console.is_terminal, every, unit):
            yield bar
