"""A pack behind OpenAI's API: `model` names a task, requests of all tasks run in one batch.

    d2c-mlx serve runs/first/pack

uvicorn speaks HTTP, Starlette finds the address (`routes`), and the `Scheduler` generates. uvicorn
has no deadline for a request's head and no limit to idle connections; these are here.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from threading import Event, Thread
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.service import PackService
from d2c_mlx.web.front import Access
from d2c_mlx.web.routes import application

__all__ = ["PackServer"]

# Most bytes of the request line and headers.
_HEAD_NBYTES = 65_536
# In which the last replies are sent when the server stops.
_REPLY_SECONDS = 5
# In which a client that was refused may read why.
_LINGER_SECONDS = 1.0


class PackServer:
    """Listens; call `run` to serve, and `stop` from another thread or a signal to end that.

    Attributes:
        service: what it serves; closed with the server.
        address: host and port.
    """

    def __init__(
        self, address: tuple[str, int], service: PackService, access: Access | None = None
    ) -> None:
        """Listen.

        Args:
            address: host and port; port 0 takes any free one.
            service: what to serve. It is closed if the address cannot be had.
            access: None lets every client of this machine ask, and no web page.

        Raises:
            OSError: the address cannot be had.
            UnicodeError: the host is no name of one.
        """
        self.service = service
        try:
            self._socket = _listen(address)
        except (OSError, UnicodeError):
            service.close()
            raise
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        limits = service.limits
        places = _Places(limits.batch + limits.queue + limits.spare)
        protocol: Any = partial(_Connection, places, limits.seconds)
        config = uvicorn.Config(
            application(service, access or Access()), http=protocol,
            loop="asyncio", ws="none", lifespan="off", log_config=None, log_level="critical",
            access_log=False, proxy_headers=False, server_header=False, backlog=128,
            timeout_graceful_shutdown=_REPLY_SECONDS, h11_max_incomplete_event_size=_HEAD_NBYTES,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._stopped = Event()

    @property
    def url(self) -> str:
        """The base URL that clients use."""
        host, port = self.address
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def stop(self) -> None:
        """Have `run` end."""
        self._stopped.set()

    def run(self) -> None:
        """Serve until `stop` is called.

        Requests that run may then end, for some seconds; whoever comes is told that we stop.
        """
        # Not on this thread: uvicorn would take its signals.
        thread = Thread(target=self._server.run, args=([self._socket],), daemon=True)
        thread.start()
        while thread.is_alive() and not self._stopped.wait(1.0):
            pass
        self.service.close()
        self._server.should_exit = True
        thread.join()
        self._socket.close()


def _listen(address: tuple[str, int]) -> socket.socket:
    family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family, backlog=128)


class _Connection(H11Protocol):
    """uvicorn's connection, with a deadline for every request and a place among all.

    The application finds it as `scope["state"]["connection"]`.

    Attributes:
        deadline: of the request that comes, by the loop's clock.
    """

    def __init__(self, places: _Places, seconds: float, **options: Any) -> None:  # noqa: ANN401  uvicorn's
        state = {**options.pop("app_state"), "connection": self}
        super().__init__(app_state=state, **options)
        self._places, self._seconds = places, seconds
        self.deadline, self._refused = 0.0, False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _Closing(transport, self._close))
        self._expect_head()
        if not self._places.take(self):
            self.refuse(503, "too many connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._places.free(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._timer and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        super().data_received(data)

    def on_response_complete(self) -> None:
        if not self._refused:
            self._places.take(self)
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._seconds, self._end_if_stuck)

    def _expect_head(self) -> None:
        self.deadline = self.loop.time() + self._seconds
        self._timer = self.loop.call_at(self.deadline, self._is_late)

    def _is_late(self) -> None:
        self.refuse(408, f"the request is not there after {self._seconds:g} seconds; send it at"
                    " once")  # fmt: skip

    def _end_if_stuck(self) -> None:
        if self.transport.get_write_buffer_size():
            self.abort()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def head_received(self) -> None:
        """The application has the request's head; its body is still coming, maybe."""
        if not self._timer:
            # It came together with the one before.
            self.deadline = self.loop.time() + self._seconds
        self._stop_timer()

    def received(self) -> None:
        """Keep the connection until its reply is sent: its request is there."""
        self._places.received(self)

    def abort(self) -> None:
        """Close the connection whatever was not sent."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Say as JSON what h11 found wrong; uvicorn says it as text, without the reason."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            status = 414
        self.refuse(status, f"Bad request ({error or msg})")

    def refuse(self, status: int, message: str) -> None:
        """Reply without the application, and close."""
        if self._refused:
            return
        body = json.dumps(RequestError(status, message).body).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._linger()

    def _close(self, transport: asyncio.Transport) -> None:
        """Close after a reply of the application, which need not have read the whole request."""
        if self.cycle and self.cycle.more_body:
            self._linger()
        else:
            transport.close()

    def _linger(self) -> None:
        """Read and drop what is still coming, then close.

        Closing at once would reset the connection before the client has read the reply.
        """
        self._refused = True
        self._stop_timer()
        self._places.free(self)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.abort)


class _Closing:
    """A transport whose `close` is another function; uvicorn has no other place to change it."""

    def __init__(
        self, transport: asyncio.Transport, close: Callable[[asyncio.Transport], None]
    ) -> None:
        self._transport, self.close = transport, partial(close, transport)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  of the transport
        return getattr(self._transport, name)


class _Places:
    """The open connections, at most a number; whoever still waits for a request may have to go."""

    def __init__(self, most: int) -> None:
        self._most = most
        # Oldest first -> whether its request is still coming.
        self._open: dict[_Connection, bool] = {}

    def take(self, connection: _Connection) -> bool:
        """Take a place to wait for a request in, if need be that of who has been slow for longest.

        Returns:
            False if every place has a request.
        """
        self._open.pop(connection, None)
        if len(self._open) >= self._most:
            slowest = next((one for one, coming in self._open.items() if coming), None)
            if slowest is None:
                return False
            slowest.refuse(408, "the connection was needed by another client; try again")
        self._open[connection] = True
        return True

    def received(self, connection: _Connection) -> None:
        """Keep a connection until it ends: its request is there."""
        if connection in self._open:
            self._open[connection] = False

    def free(self, connection: _Connection) -> None:
        """Give the place of a connection back."""
        self._open.pop(connection, None)
