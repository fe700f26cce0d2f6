"""The addresses of the server, and replies to chats and texts, whole or streamed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2c_mlx.serve import api
from d2c_mlx.serve.answers import Answer, Choice, Completion, Usage
from d2c_mlx.serve.api import RequestError
from d2c_mlx.serve.front import Access, Front, read_body
from d2c_mlx.serve.scheduler import STARTED, Job, Piece
from d2c_mlx.serve.service import PackService

__all__ = ["application"]

_CHAT = ("/v1/chat/completions", "/chat/completions")


def application(service: PackService, access: Access) -> ASGIApp:
    """The application that serves a pack to those who may ask."""

    def get(path: str, answer: Callable[..., Any]) -> Route:
        return Route(path, partial(answer, service), methods=["GET"])

    routes = [
        get("/health", _health), get("/metrics", _metrics), get("/v1/models", _models),
        get("/v1/models/{name:path}", _model),
        *(Route(path, Completions(service, True), methods=["POST"]) for path in _CHAT),
        Route("/v1/completions", Completions(service, False), methods=["POST"]),
    ]  # fmt: skip
    if access.page:
        routes.append(Route("/", _page, methods=["GET"]))
    return Front(Router(routes, redirect_slashes=False), service, access)


async def _page(_request: HttpRequest) -> Response:
    """The chat page: its browser runs no other script, and loads nothing from elsewhere."""
    page = (Path(__file__).parent / "chat.html").read_bytes()
    own = {}
    for kind in (b"style", b"script"):
        (inline,) = re.findall(b"<%s>(.*?)</%s>" % (kind, kind), page, re.DOTALL)
        own[kind] = base64.b64encode(hashlib.sha256(inline).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action"
        f" 'none'; frame-ancestors 'none'; style-src 'sha256-{own[b'style']}'; script-src"
        f" 'sha256-{own[b'script']}'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}  # fmt: skip
    return Response(page, headers=headers, media_type="text/html")


async def _health(service: PackService, _request: HttpRequest) -> Response:
    good = service.scheduler.accepts
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


async def _metrics(service: PackService, _request: HttpRequest) -> Response:
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


async def _models(service: PackService, _request: HttpRequest) -> Response:
    return JSONResponse(
        {"object": "list", "data": [_describe(service, name) for name in service.names]}
    )


async def _model(service: PackService, request: HttpRequest) -> Response:
    name = request.path_params["name"]
    service.check_model(name)
    return JSONResponse(_describe(service, name))


def _describe(service: PackService, name: str) -> dict[str, Any]:
    """An entry of `/v1/models`; tasks have the base model as `parent`, as vLLM's adapters."""
    parent = service.base_name if service.models.get(name) else None
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx",
            "parent": parent}  # fmt: skip


class Completions:
    """A route that answers chats or texts, streamed or whole."""

    def __init__(self, service: PackService, chat: bool) -> None:
        """Answer chats, or texts."""
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; raises ConnectionAbortedError as soon as its client has left."""
        raw = await read_body(HttpRequest(scope, receive), self._service)
        request = api.read_request(raw, self._chat, self._service.vocabulary)
        work = asyncio.create_task(self._reply(request, send))
        left = asyncio.create_task(_gone(receive))
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        try:
            if not work.done():
                raise ConnectionAbortedError
            work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _reply(self, request: api.Request, send: Send) -> None:
        reply = _Reply(self._service, request)
        try:
            await reply.start()
            await (reply.stream(send) if request.stream else reply.whole(send))
        except RuntimeError as error:
            raise RequestError(500, str(error)) from None
        finally:
            reply.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Reply:
    """The reply to a request, as its job runs."""

    def __init__(self, service: PackService, request: api.Request) -> None:
        self._service, self._request = service, request
        self._chat = isinstance(request, api.ChatRequest)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4()}"
        self._created = int(time.time())
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._job: Job | None = None
        self._pieces: list[Piece] = []
        self._n_tokens = 0

    async def start(self) -> None:
        """Queue the job, and wait until it is in the batch; raises RequestError."""
        loop = asyncio.get_running_loop()

        def emit(event: object) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._job = await run_in_threadpool(self._service.job, self._request, emit)
        self._service.scheduler.submit(self._job)
        while await self._next() != STARTED:
            pass

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self._job:
            self._job.cancelled = True

    async def _next(self) -> Any:  # noqa: ANN401  see `Job.emit`
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def _news(self, answer: Answer) -> AsyncIterator[tuple[int, int] | None]:
        """Fill an answer until it ends; yields progress of the prompt, and None for each piece."""
        while (event := await self._next()) is not None:
            if isinstance(event, Piece):
                self._pieces.append(event)
                self._n_tokens += 1
                answer.add(event.text, event.finish_reason)
            yield event if isinstance(event, tuple) else None

    async def whole(self, send: Send) -> None:
        """Send the answer when it is whole."""
        answer = self._answer()
        async for _ in self._news(answer):
            pass
        content = self._event([self._choice(answer)], self._usage()).text()
        reply = Response(content, headers=self._route(), media_type="application/json")
        await reply({"type": "http"}, _never, send)

    async def stream(self, send: Send) -> None:
        """Send the answer piece by piece."""
        headers = {"Cache-Control": "no-cache", **self._route()}
        start = Response(headers=headers, media_type="text/event-stream")
        del start.headers["Content-Length"]
        await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})

        async def say(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        answer = self._answer()
        async for progress in self._news(answer):
            if progress:
                await say(b": keepalive %d/%d\n\n" % progress)
            elif answer.has_news and not answer.finish_reason:
                await say(_data(self._event([self._choice(answer)])))
        await say(_data(self._event([self._choice(answer)])))
        if self._request.stream_options.get("include_usage"):
            await say(_data(self._event([], self._usage())))
        await say(b"data: [DONE]\n\n", more=False)

    def _route(self) -> dict[str, str]:
        """What the router found, as a header, if it was asked."""
        assert self._job
        return {"X-D2C-Route": json.dumps(self._job.route)} if self._job.route else {}

    def _answer(self) -> Answer:
        assert self._job
        return self._service.answer(self._request, self._job.prompt)

    def _choice(self, answer: Answer) -> Choice:
        """What an answer has that was not sent."""
        fields: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason}
        whole = not self._request.stream
        if self._chat:
            fields["message" if whole else "delta"] = answer.take(whole)
        else:
            fields["text"] = answer.take_text()
        pieces, self._pieces = self._pieces, []
        if self._request.logprobs:
            content = self._service.logprobs(pieces)
            fields["logprobs"] = {"content": content} if content else None
        return Choice(**fields)

    def _usage(self) -> Usage:
        assert self._job
        n, m = len(self._job.prompt), self._n_tokens
        return Usage(prompt_tokens=n, completion_tokens=m, total_tokens=n + m)

    def _event(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        assert self._job
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat and self._request.stream:
            kind += ".chunk"
        fields = {} if usage is None else {"usage": usage}
        return Completion(
            id=self._id, object=kind, created=self._created, choices=choices,
            model=self._service.name_of(self._job.task), system_fingerprint="d2c-mlx", **fields,
        )  # fmt: skip


def _data(event: Completion) -> bytes:
    return b"data: " + event.text() + b"\n\n"


async def _never() -> Message:
    raise AssertionError
