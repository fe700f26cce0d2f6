"""A pack behind OpenAI's API: `model` names a task, requests of all tasks run in one batch.

    d2c-mlx serve runs/first/pack

HTTP and the form of replies are mlx-lm's `APIHandler`. Every request is checked before it
(`requests`); behind it the `Scheduler` generates, since mlx-lm's own thread empties its batch
before it changes an adapter, and then loads the model again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from d2c_mlx.serve.connections import Places, is_readable
from d2c_mlx.serve.handler import Handler
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.service import PackService

__all__ = ["PackServer"]

_log = logging.getLogger(__name__)
# Connections beyond those whose requests may run or wait.
_SPARE_CONNECTIONS = 64
# In which the last replies are sent when the server stops.
_REPLY_SECONDS = 5.0
_BODY = json.dumps(RequestError(503, "too many connections; try again later").body)
_FULL = (
    "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()


class PackServer(ThreadingHTTPServer):
    """Listens, and gives every connection a thread; call `serve_forever` to run it.

    Attributes:
        service: what it serves; closed with the server.
    """

    daemon_threads = True
    request_queue_size = 128
    # Of `handle_request`, which `server_close` calls for those who are there already.
    timeout = 0

    def __init__(self, address: tuple[str, int], service: PackService) -> None:
        """Listen.

        Args:
            address: host and port; port 0 takes any free one.
            service: what to serve. It is closed if the address cannot be had.

        Raises:
            OSError: the address cannot be had.
        """
        self.service, self._listens = service, False
        limits = service.limits
        self.places = Places(limits.batch + limits.queue + _SPARE_CONNECTIONS)
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            self.address_family = found[0][0]
        super().__init__(address, partial(Handler, service))

    @property
    def url(self) -> str:
        """The base URL that clients use."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        return f"http://[{name}]:{port}/v1" if ":" in name else f"http://{name}:{port}/v1"

    def server_activate(self) -> None:
        """Start to listen."""
        super().server_activate()
        self._listens = True

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Start a thread for a connection; refuse it at once if every place has a request."""
        if self.places.take(request):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0)
            request.send(_FULL)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401
        """Close a connection, and free its place."""
        self.places.free(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Log what went wrong; a client that left is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("a request failed")

    def server_close(self) -> None:
        """Stop: requests that run may end, for some seconds; whoever waits is told that we stop."""
        self.service.scheduler.drain(0)
        # Connected already, but never accepted; none where the address could not be had.
        while self._listens and is_readable(self.socket):
            self.handle_request()
        super().server_close()
        self.service.close()
        self.places.end_all(_REPLY_SECONDS)
