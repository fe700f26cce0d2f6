"""A word as soon as Ctrl-C is pressed, however long the step at work takes to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts_told"]

# The first line end is for the ^C of a terminal.
_WORD = b"\nstopping at the end of this step; what is done is kept\n"


@contextmanager
def interrupts_told() -> Iterator[None]:
    """Print a line at every Ctrl-C from a thread; Python's own handler waits for the step.

    The thread has ended when this does, so that no later line is mixed with its own.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_tell, args=(read,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


def _tell(read: int) -> None:
    while signals := os.read(read, 1):
        if signals[0] == signal.SIGINT:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _WORD)
