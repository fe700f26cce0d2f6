"""What every request passes before its route: who may ask, deadlines, errors as JSON."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2c_mlx.serve.metrics import log_request
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.service import PackService

__all__ = ["LOOPBACK", "Access", "Front", "read_body"]

_log = logging.getLogger(__name__)
# Names by which this machine's own clients ask.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The second is that of a proxy before the server.
_SCHEMES = ("http", "https")
# RFC 9110: HEAD is answered as GET, and uvicorn leaves out the body.
_READS = ("GET", "HEAD")
_MOST_HEADERS, _MOST_TARGET = 100, 8000
# Of a request that is refused, this much is read and dropped, for so long: unread bytes would reset
# the connection before the client has read the reply.
_MAX_DRAIN, _DRAIN_SECONDS = 16_000_000, 1.0


@dataclass(frozen=True)
class Access:
    """Rules for the clients that may use a server.

    Attributes:
        token: that requests bring as `Authorization: Bearer`; None asks for none.
        origins: web pages that may ask, as browsers name them; "*" is all, others are refused.
        hosts: names by which clients may ask, without ports; "*" is any address in digits.
        page: `/` is a chat page, which asks for the token itself.
        changes: adapters may be loaded and unloaded, by whoever has the token.
    """

    token: str | None = None
    origins: Sequence[str] = ()
    hosts: Sequence[str] = LOOPBACK
    page: bool = True
    changes: bool = False

    def check(self, headers: Headers, needs_token: bool = True) -> None:
        """Check that a request with these headers may ask.

        Browsers bring no token in a preflight, and where a person opens a page.

        Raises:
            RequestError: (400, 401, 403 or 421) it may not.
        """
        self._check_host(headers)
        self._check_origin(headers)
        if needs_token:
            self._check_token(headers)

    def _check_host(self, headers: Headers) -> None:
        """A page whose name was led here is no other origin to its browser: it could read all."""
        given = headers.getlist("Host")
        if len(given) > 1:
            raise RequestError(400, f"Host: found {len(given)}, expected one")
        if not given:
            return
        name = re.sub(r":[0-9]*$", "", given[0].strip().lower()).removesuffix(".").strip("[]")
        if name in self.hosts or ("*" in self.hosts and _is_address(name)):
            return
        raise RequestError(
            421,
            f"Host: found {given[0][:80]!r}, which is no name of this server; start it with"
            " --allowed-host to add one",
        )

    def _check_origin(self, headers: Headers) -> None:
        """A page that the user happens to visit must not use the model; ours is of this host."""
        origin, host = headers.get("Origin"), headers.get("Host")
        own = [f"{scheme}://{host}" for scheme in _SCHEMES] if self.page else []
        if origin is not None and origin not in (*own, *self.origins) and "*" not in self.origins:
            raise RequestError(
                403, f"Origin {origin}: not allowed; start with --allow-origin {origin}"
            )

    def _check_token(self, headers: Headers) -> None:
        # The bytes that were sent.
        given = headers.get("Authorization", "").encode("latin-1")
        # RFC 9110: the name of a scheme is case-insensitive.
        if given[:7].lower() == b"bearer ":
            given = given[7:]
        if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
            raise RequestError(401, "Authorization: expected Bearer and this server's token")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Front:
    """What every request passes: who may ask, deadlines, and errors as JSON."""

    def __init__(self, app: ASGIApp, service: PackService, access: Access) -> None:
        """Stand before an application."""
        self._app, self._service, self._access = app, service, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = _Exchange(self._service, self._access, scope, receive, send)
        began = time.perf_counter()
        try:
            await self._serve(exchange, scope)
        finally:
            log_request(
                method=scope["method"], path=scope["path"][:80], status=exchange.status or 499,
                seconds=round(time.perf_counter() - began, 4), **scope["state"].get("facts", {}),
            )  # fmt: skip

    async def _serve(self, exchange: _Exchange, scope: Scope) -> None:
        try:
            exchange.check()
            # Starlette raises what it refuses only inside an application.
            scope["app"] = self
            await self._app(scope, exchange.receive, exchange.send)
        except RequestError as error:
            await exchange.refuse(error)
        except HTTPException as error:
            await exchange.refuse(_of_starlette(error, scope))
        except (ConnectionError, TimeoutError):
            # The client has left, or takes nothing any more.
            self._service.metrics.disconnected.inc()
            scope["state"]["connection"].abort()
        except Exception as error:  # a model's words, or its template, may be anything
            _log.exception("a reply failed")
            words = f"the reply failed ({type(error).__name__})"
            await exchange.refuse(RequestError(500, words))


class _Exchange:
    """A request and its reply on a connection.

    Attributes:
        status: of the reply once it began, else 0.
    """

    def __init__(
        self, service: PackService, access: Access, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._service, self._access, self._scope = service, access, scope
        self._receive, self._send = receive, send
        self._headers = Headers(scope=scope)
        self._connection = scope["state"]["connection"]
        self._connection.head_received()
        # Whether the request has more body.
        self._more, self.status = True, 0

    def check(self) -> None:
        """Check who asks, and how; raises RequestError."""
        if len(self._headers) > _MOST_HEADERS:
            raise RequestError(431, f"found {len(self._headers)} headers, at most {_MOST_HEADERS}")
        target = self._scope["raw_path"] + self._scope["query_string"]
        if len(target) > _MOST_TARGET:
            raise RequestError(414, f"the address has {len(target)} bytes, at most {_MOST_TARGET}")
        method = self._scope["method"]
        if method not in (*_READS, "POST", "OPTIONS"):
            words = f"{method}: not supported, expected GET, HEAD, POST or OPTIONS"
            raise RequestError(501, words)
        is_page = self._access.page and method in _READS and self._scope["path"] == "/"
        self._access.check(self._headers, needs_token=method != "OPTIONS" and not is_page)
        if method == "OPTIONS":
            raise _Preflight
        if method == "POST" and not {"content-length", "transfer-encoding"} & {*self._headers}:
            raise RequestError(411, "Content-Length: missing")
        if method in _READS:
            self._connection.received()

    async def receive(self) -> Message:
        """As ASGI's; remembers whether there is more."""
        message = await self._receive()
        if not message.get("more_body"):
            self._more = False
            self._connection.received()
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's, with CORS headers; TimeoutError if the client takes nothing."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_cors(MutableHeaders(scope=message))
        elif not message.get("more_body"):
            self._service.metrics.replies.labels(str(self.status)).inc()
        async with asyncio.timeout(self._service.limits.seconds):
            await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Reply with an error: in its stream if that began, else with its status."""
        if self.status:
            event = f"data: {json.dumps(error.body)}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
            return
        if self._more and error.status != 408 and "expect" not in self._headers:
            await self._drain()
        if isinstance(error, _Preflight):
            reply = Response(status_code=204)
        else:
            content = json.dumps(error.body, ensure_ascii=False).encode()
            headers = {"Retry-After": "1"} if error.status == 503 else None
            reply = Response(content, error.status, headers, "application/json")
        with suppress(ConnectionError, TimeoutError):
            await reply(self._scope, self._receive, self.send)

    async def _drain(self) -> None:
        left = _MAX_DRAIN
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._more and left > 0:
                    left -= len((await self.receive()).get("body", b""))

    def _add_cors(self, headers: MutableHeaders) -> None:
        origin, allowed = self._headers.get("Origin"), self._access.origins
        if "*" in allowed:
            headers["Access-Control-Allow-Origin"] = "*"
        elif origin and origin in allowed:
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        headers["Access-Control-Allow-Methods"] = "*"
        # By the Fetch standard "*" leaves out Authorization.
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, *"
        headers["Access-Control-Expose-Headers"] = "X-D2C-Route"


class _Preflight(RequestError):
    """The good answer to a browser's question whether it may ask."""

    def __init__(self) -> None:
        super().__init__(204, "")


def _of_starlette(error: HTTPException, scope: Scope) -> RequestError:
    if error.status_code in (404, 405):
        there = "/v1/models" if scope["method"] in _READS else "/v1/chat/completions"
        return RequestError(404, f"{scope['path'][:80]}: no such address; there is {there}")
    return RequestError(error.status_code, error.detail)


async def read_body(request: Request, service: PackService) -> bytes:
    """Read the body of a request.

    Raises:
        RequestError: it is too large (413), or does not come in time (408).
        ConnectionError: it ends before.
    """
    limits, parts, size = service.limits, [], 0
    length = request.headers.get("Content-Length", "0")
    try:
        async with asyncio.timeout_at(request.scope["state"]["connection"].deadline):
            while int(length) <= limits.body_nbytes and size <= limits.body_nbytes:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionAbortedError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            408, f"the request is not there after {limits.seconds:g} seconds; send it at once"
        ) from None
    size = max(size, int(length))
    raise RequestError(413, f"the body has {size} bytes, this server takes {limits.body_nbytes:,}")
