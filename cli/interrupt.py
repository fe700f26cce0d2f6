"""A word as soon as Ctrl-C is pressed, however long the step at work takes to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import cache

__all__ = ["tell_of_interrupts"]

# The first line end is for the ^C of a terminal, the last one is click's.
_WORD = b"\nstopping at the end of this step; what is done is kept"


@cache  # once in a process
def tell_of_interrupts() -> None:
    """Print a line at every Ctrl-C from a thread; Python's own handler waits for the step."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_tell, args=(read,), daemon=True).start()


def _tell(read: int) -> None:
    while signals := os.read(read, 1):
        if signals[0] == signal.SIGINT:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _WORD)
