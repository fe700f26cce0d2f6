"""Connections of the server: a deadline for what clients send, and a place for those who are quick.

A client that sends a byte now and then must not hold a place that another needs.
"""

from __future__ import annotations

import contextlib
import io
import select
import socket
import time
from threading import Condition

from d2c_mlx.serve.requests import RequestError

__all__ = ["Places", "RequestReader", "is_readable"]


class RequestReader(io.RawIOBase):
    """What a client sends, until a moment, however it trickles in."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        """Read from `connection` for at most `seconds` from now."""
        self._connection, self._seconds = connection, seconds
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        """True: it is read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what there is, at least a byte; 0 at the end. Raises RequestError (408) too late."""
        try:
            # Blocking for 0 seconds would be not to block at all.
            self._connection.settimeout(max(self._end - time.monotonic(), 1e-3))
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise RequestError(
                408, f"the request is not there after {self._seconds:g} seconds; send it at once"
            ) from None
        finally:
            self._connection.settimeout(self._seconds)


class Places:
    """The open connections, at most a number; whoever still waits for a request may have to go."""

    def __init__(self, most: int) -> None:
        self._most = most
        # Oldest first -> whether its request is still coming.
        self._open: dict[socket.socket, bool] = {}
        self._changed = Condition()

    def take(self, connection: socket.socket) -> bool:
        """Take a place, if need be that of the client that has been slow for longest.

        Returns:
            False if every place has a request.
        """
        with self._changed:
            if len(self._open) >= self._most and not self._end_slowest():
                return False
            self._open[connection] = True
            return True

    def received(self, connection: socket.socket) -> None:
        """Keep a connection until it ends: its request is there."""
        with self._changed:
            if connection in self._open:
                self._open[connection] = False

    def free(self, connection: socket.socket) -> None:
        """Give the place of a connection back; call it before the connection is closed."""
        with self._changed:
            self._open.pop(connection, None)
            self._changed.notify_all()

    def end_all(self, seconds: float) -> None:
        """End the connections without a request, and wait up to `seconds` for the replies."""
        with self._changed:
            while self._end_slowest():
                pass
            self._changed.wait_for(lambda: not self._open, seconds)

    def _end_slowest(self) -> bool:
        for connection, coming in self._open.items():
            # One with bytes that its thread has not come to is not slow.
            if coming and not is_readable(connection):
                del self._open[connection]
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
                return True
        return False


def is_readable(connection: socket.socket) -> bool:
    """True if there are bytes to read, or the other side has ended."""
    # Other than `select.select`, for any number of open files.
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
