"""A pack behind OpenAI's API: `model` names a task, requests of all tasks run in one batch.

    d2c-mlx serve runs/first/pack

uvicorn speaks HTTP, Starlette finds the address (`routes`), and the `Scheduler` generates. uvicorn
has no deadline for a request; it is here.
"""

import hmac
import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, TextIO

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.service import PackService
from d2c_mlx.utils.errors import warn
from d2c_mlx.web.routes import ADDRESSES, CHANGES

_log = logging.getLogger(__name__)
# Names by which this machine's own clients ask.
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Most bytes of the request line and headers.
_HEAD_NBYTES = 65_536
# In which the last replies are sent when the server stops.
_REPLY_SECONDS = 5
# Connections beside those whose requests run or wait.
_SPARE = 64


class PackServer:
    """Listens; call `run` to serve, and `stop` from another thread or a signal to end that.

    Attributes:
        service: what it serves; closed with the server.
        address: host and port.
    """

    def __init__(
        self,
        address: tuple[str, int],
        service: PackService,
        token: str | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = LOOPBACK,
        log: TextIO | None = None,
    ) -> None:
        """Listen.

        Args:
            address: host and port; port 0 takes any free one.
            service: what to serve. It is closed if the address cannot be had.
            token: that requests bring as `Authorization: Bearer`; None asks for none, and lets
                nobody change the adapters.
            origins: web pages that may ask, as browsers name them; "*" is all, others are refused.
            hosts: names by which clients may ask, without ports; "*" is any.
            log: file for a line of JSON per request, with nothing of what was said; None is none.

        Raises:
            OSError: the address cannot be had.
            UnicodeError: the host is no name of one.
        """
        self.service = service
        try:
            family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(place[:2], family=family, backlog=128)
        except (OSError, UnicodeError):
            service.scheduler.close()
            raise
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        protocol: Any = partial(_Connection, service.limits.seconds)
        config = uvicorn.Config(
            _application(service, token, origins, hosts, log),
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=service.limits.batch + service.limits.queue + _SPARE,
            timeout_graceful_shutdown=_REPLY_SECONDS,
            h11_max_incomplete_event_size=_HEAD_NBYTES,
        )
        self._server = _Server(config)
        self._server.service = service

    @property
    def url(self) -> str:
        """The base URL that clients use."""
        host, port = self.address
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def stop(self) -> None:
        """Have `run` end."""
        self._server.should_exit = True

    def run(self) -> None:
        """Serve until `stop` is called, or Ctrl-C or SIGTERM comes.

        Requests that run may then end, for some seconds; whoever comes is told that we stop.
        """
        try:
            self._server.run([self._socket])
        finally:
            self.service.scheduler.close()
            self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn's server, which lets requests end before it closes their connections."""

    service: PackService

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await run_in_threadpool(self.service.scheduler.close)
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """uvicorn's connection, with a deadline for each request, and for taking its reply."""

    def __init__(self, seconds: float, **options: Any) -> None:  # noqa: ANN401  uvicorn's
        super().__init__(**options)
        self._seconds = seconds
        self._timer = self.loop.call_later(seconds, self._end_late)

    def on_response_complete(self) -> None:
        # Time for the next request, and for what is not sent of the reply before.
        if not self.flow.write_paused:
            self._begin(self._end_late)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin(self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._begin(self._end_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._timer.cancel()

    def _begin(self, end: Callable[[], None]) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds, end)

    def _end_late(self) -> None:
        """End the connection if a request, or a part of it, did not come in time."""
        if self.transport.is_closing():
            self.transport.abort()
        elif not self.cycle or self.cycle.response_complete or self.cycle.more_body:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()  # It has its reply, and no other may follow.
                return
            words = f"the request is not there after {self._seconds:g} seconds; send it at once"
            self.send_400_response(words)


def _application(
    service: PackService,
    token: str | None,
    origins: Sequence[str],
    hosts: Sequence[str],
    log: TextIO | None,
) -> ASGIApp:
    """The application that serves a pack to those who may ask."""

    def check(request: Request) -> None:
        # A page that the user happens to visit must not use the model; ours is of this host.
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        allowed = {f"http://{host}", f"https://{host}", *origins}
        if origin is not None and origin not in allowed and "*" not in allowed:
            origin = ascii(origin[:80])
            raise RequestError(403, f"Origin {origin}: not allowed; start with --allow-origin")
        # The bytes that were sent; RFC 9110: the name of a scheme is case-insensitive.
        given = request.headers.get("Authorization", "").encode("latin-1")
        given = given[7:] if given[:7].lower() == b"bearer " else given
        asked = token is not None and request.url.path != "/"
        if asked and not hmac.compare_digest(given, (token or "").encode()):
            raise RequestError(401, "Authorization: expected Bearer and this server's token")

    def route(method: str, path: str, answer: Callable[..., Any]) -> Route:
        async def checked(request: Request) -> Response:
            check(request)
            return await answer(service, request)

        return Route(path, checked, methods=[method])

    cors: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
    cors |= {"allow_origins": list(origins), "expose_headers": ["X-D2C-Route"]}
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(CORSMiddleware, **cors),
    ]
    kinds = (RequestError, HTTPException, ClientDisconnect, Exception)
    handlers: Any = dict.fromkeys(kinds, _refuse)
    addresses = (*ADDRESSES, *CHANGES) if service.directory and token is not None else ADDRESSES
    routes = [route(*address) for address in addresses]
    return _logged(Starlette(False, routes, middleware, handlers), log)


def _logged(app: ASGIApp, log: TextIO | None) -> ASGIApp:
    """The application, which also ends the job of a request with its reply, and logs numbers."""

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal log
        status, began, state = 500, time.perf_counter(), scope["state"]

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, watched)
        finally:
            facts = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "method": scope["method"][:16],
                "path": scope["path"][:80],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                **state.get("asked", {}),
            }
            if answer := state.get("answer"):
                facts |= answer.end()
            try:
                if log:
                    # In ASCII, so that nothing in a path or a name is a control sequence.
                    log.write(json.dumps(facts).replace("\x7f", "\\u007f") + "\n")
                    log.flush()
            except OSError as error:
                warn(f"--log-file: requests are logged no more ({error.strerror})")
                log = None

    return front


async def _refuse(request: Request, error: Exception) -> Response:
    """The reply to a request that is refused, or fails: a model's words may be anything."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        there = "/v1/models" if request.method in ("GET", "HEAD") else "/v1/chat/completions"
        words = f"{ascii(request.url.path[:80])}: no such address; there is {there}"
        error = RequestError(404, words)
    if not isinstance(error, RequestError):
        _log.error("a reply failed", exc_info=error)
        error = RequestError(500, f"the reply failed ({type(error).__name__})")
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)
