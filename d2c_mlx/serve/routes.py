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
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2c_mlx.serve import api
from d2c_mlx.serve.api import RequestError
from d2c_mlx.serve.front import Access, Front, read_body
from d2c_mlx.serve.jobs import STARTED, Job, Piece
from d2c_mlx.serve.service import PackService
from d2c_mlx.serve.text import Answer, Choice, Completion, Encoder, Usage

__all__ = ["application"]

_CHAT = ("/v1/chat/completions", "/chat/completions")


def application(service: PackService, access: Access) -> ASGIApp:
    """The application that serves a pack to those who may ask."""

    def route(method: str, path: str, answer: Callable[..., Any]) -> Route:
        return Route(path, partial(answer, service), methods=[method])

    def change(path: str, answer: Callable[..., Any]) -> Route:
        return route("POST", path, answer if access.changes and access.token else _no_changes)

    routes = [
        route("GET", "/health", _health), route("GET", "/health/ready", _health),
        route("GET", "/health/live", _live), route("GET", "/metrics", _metrics),
        route("GET", "/v1/models", _models), route("GET", "/v1/models/{name:path}", _model),
        route("GET", "/lora-adapters", _adapters), change("/lora-adapters", _scale),
        change("/v1/load_lora_adapter", _load), change("/v1/unload_lora_adapter", _unload),
        change("/v1/reload", _reload), route("POST", "/v1/embeddings", _no_embeddings),
        *(Route(path, Completions(service, True), methods=["POST"]) for path in _CHAT),
        Route("/v1/completions", Completions(service, False), methods=["POST"]),
    ]  # fmt: skip
    if access.page:
        routes.append(Route("/", _page, methods=["GET"]))
    return Front(Router(routes, redirect_slashes=False), service, access)


async def _page(_request: HttpRequest) -> Response:
    """The chat page: its browser runs no other script, and loads nothing from elsewhere."""
    page = (Path(__file__).parent / "static/chat.html").read_bytes()
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
    return _state(service.scheduler.accepts)


async def _live(service: PackService, _request: HttpRequest) -> Response:
    return _state(service.scheduler.alive)


def _state(good: bool) -> Response:
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


async def _metrics(service: PackService, _request: HttpRequest) -> Response:
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


async def _models(service: PackService, _request: HttpRequest) -> Response:
    data = [_describe(service, name) for name in service.names]
    return JSONResponse({"object": "list", "data": data})


async def _model(service: PackService, request: HttpRequest) -> Response:
    name = request.path_params["name"]
    service.check_model(name)
    return JSONResponse(_describe(service, name))


def _describe(service: PackService, name: str) -> dict[str, Any]:
    """An entry of `/v1/models`; `root` and `parent` are vLLM's."""
    entry, base = service.adapters.names.get(name), service.base_name
    root = str(entry.path) if entry else name
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx",
            "root": root, "parent": base if entry else None}  # fmt: skip


async def _adapters(service: PackService, _request: HttpRequest) -> Response:
    """llama.cpp's list; the first task of an adapter stands for all."""
    entries = {entry: name for name, entry in reversed([*service.adapters.names.items()])}
    return JSONResponse([
        {"id": entry.id, "path": str(entry.path), "scale": entry.scale, "task_name": name,
         "prompt_prefix": ""}
        for entry, name in sorted(entries.items(), key=lambda one: one[0].id)
    ])  # fmt: skip


async def _no_embeddings(_service: PackService, _request: HttpRequest) -> Response:
    raise RequestError(404, "/v1/embeddings: no such address; a pack's model makes no embeddings")


async def _no_changes(_service: PackService, request: HttpRequest) -> Response:
    raise RequestError(404, f"{request.url.path}: adapters do not change; start the server with"
                            " --allow-changes and --token")  # fmt: skip


async def _scale(service: PackService, request: HttpRequest) -> Response:
    scales = api.read_json(await read_body(request, service))
    found = api.read_fields(api.ScalesRequest, {"scales": scales})
    await asyncio.wrap_future(service.set_scales(found.scales))
    return JSONResponse({"success": True})


async def _load(service: PackService, request: HttpRequest) -> Response:
    body = api.read_object(await read_body(request, service))
    if body.get("is_3d_lora_weight"):
        raise RequestError(400, "is_3d_lora_weight: not supported; leave it out")
    asked = api.read_fields(api.LoadRequest, body)
    await asyncio.wrap_future(service.load_adapter(asked))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: PackService, request: HttpRequest) -> Response:
    body = api.read_object(await read_body(request, service))
    name = api.read_fields(api.LoadRequest, body).lora_name
    left = await asyncio.wrap_future(service.unload_adapter(name))
    await asyncio.wrap_future(left)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _reload(service: PackService, _request: HttpRequest) -> Response:
    await asyncio.wrap_future(service.reload())
    return JSONResponse({"success": True, "tasks": [*service.pack.tasks]})


class Completions:
    """A route that answers chats or texts, streamed or whole."""

    def __init__(self, service: PackService, chat: bool) -> None:
        """Answer chats, or texts."""
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; raises ConnectionAbortedError as soon as its client has left."""
        raw = await read_body(HttpRequest(scope, receive), self._service)
        request = api.read_request(raw, self._chat, self._service.vocabulary)
        work = asyncio.create_task(self._reply(request, scope, send))
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

    async def _reply(self, request: api.Request, scope: Scope, send: Send) -> None:
        reply = _Reply(self._service, request)
        try:
            await reply.start()
            await (reply.stream(send) if request.stream else reply.whole(send))
        except RuntimeError as error:
            raise RequestError(500, str(error)) from None
        finally:
            scope["state"]["facts"] = reply.facts()
            reply.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Choice:
    """One of the answers that a request asks for, as its job runs."""

    def __init__(self, index: int, job: Job, answer: Answer) -> None:
        self.index, self.job, self.answer = index, job, answer
        self.n_tokens, self._pieces = 0, list[Piece]()

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.n_tokens += 1
        self.answer.add(piece.text, piece.finish_reason)

    def take(self, request: api.Request, encoder: Encoder) -> Choice:
        """What it has that was not sent."""
        fields: dict[str, Any] = {"index": self.index, "finish_reason": self.answer.finish_reason}
        whole = not request.stream
        if isinstance(request, api.ChatRequest):
            fields["message" if whole else "delta"] = self.answer.take(whole)
        else:
            fields["text"] = self.answer.take_text()
        pieces, self._pieces = self._pieces, []
        if request.logprobs:
            content = encoder.logprobs(pieces)
            fields["logprobs"] = {"content": content} if content else None
        return Choice(**fields)


class _Reply:
    """The reply to a request, as its jobs run."""

    def __init__(self, service: PackService, request: api.Request) -> None:
        self._service, self._request = service, request
        chat = isinstance(request, api.ChatRequest)
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}"
        self._kind = "chat.completion" if chat else "text_completion"
        if chat and request.stream:
            self._kind += ".chunk"
        self._created = int(time.time())
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._choices: list[_Choice] = []

    async def start(self) -> None:
        """Queue the jobs, and wait until one is in the batch; raises RequestError."""
        loop, request = asyncio.get_running_loop(), self._request

        def emit(index: int, event: object) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        loading = self._service.find(request.model)
        if loading:
            await asyncio.wrap_future(loading)
        emits = [partial(emit, i) for i in range(request.n)]
        jobs = await run_in_threadpool(self._service.jobs, request, emits)
        self._service.scheduler.submit(*jobs)
        answers = (self._service.answer(request, job.prompt) for job in jobs)
        self._choices = [_Choice(i, *both) for i, both in enumerate(zip(jobs, answers))]
        while (await self._next())[1] != STARTED:
            pass

    def cancel(self) -> None:
        """Nobody waits any more."""
        for one in self._choices:
            one.job.cancelled = True

    async def _next(self) -> tuple[int, Any]:
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return index, event

    async def _news(self) -> AsyncIterator[tuple[_Choice, Any]]:
        """Fill the answers until all have ended; yields each with what happened, see `Job.emit`."""
        left = len(self._choices)
        while left:
            index, event = await self._next()
            if isinstance(event, Piece):
                self._choices[index].add(event)
            left -= event is None
            yield self._choices[index], event

    async def whole(self, send: Send) -> None:
        """Send the answers when they are whole."""
        async for _ in self._news():
            pass
        content = self._event(self._choices, with_usage=True).text()
        reply = Response(content, headers=self._route(), media_type="application/json")
        await reply({"type": "http"}, _never, send)

    async def stream(self, send: Send) -> None:
        """Send the answers piece by piece."""
        headers = {"Cache-Control": "no-cache", **self._route()}
        start = Response(headers=headers, media_type="text/event-stream")
        del start.headers["Content-Length"]
        await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})

        async def say(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        async for choice, event in self._news():
            if isinstance(event, tuple):
                await say(b": keepalive %d/%d\n\n" % event)
            elif event is None or (choice.answer.has_news and not choice.answer.finish_reason):
                await say(_data(self._event([choice])))
        if self._request.stream_options.get("include_usage"):
            await say(_data(self._event([], with_usage=True)))
        await say(b"data: [DONE]\n\n", more=False)

    def _route(self) -> dict[str, str]:
        """What the router found, as a header, if it was asked."""
        route = self._choices[0].job.route
        return {"X-D2C-Route": json.dumps(route)} if route else {}

    def _usage(self) -> Usage:
        job = self._choices[0].job
        n, m = len(job.prompt), sum(one.n_tokens for one in self._choices)
        return Usage(prompt_tokens=n, prompt_tokens_details={"cached_tokens": job.n_cached},
                     completion_tokens=m, total_tokens=n + m)  # fmt: skip

    def _event(self, choices: list[_Choice], with_usage: bool = False) -> Completion:
        usage = {"usage": self._usage()} if with_usage else {}
        taken = [one.take(self._request, self._service.encoder) for one in choices]
        return Completion(
            id=self._id, object=self._kind, created=self._created, choices=taken,
            model=self._service.metrics.name(self._choices[0].job.task),
            system_fingerprint="d2c-mlx", **usage,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the log says of it: numbers and names."""
        facts: dict[str, Any] = {"id": self._id, "model": self._request.model[:80],
                                 "stream": self._request.stream}  # fmt: skip
        if self._choices:
            usage = self._usage()
            facts["task"] = self._service.metrics.name(self._choices[0].job.task)
            facts |= {"prompt_tokens": usage.prompt_tokens, "tokens": usage.completion_tokens,
                      **usage.prompt_tokens_details}  # fmt: skip
            facts["finish_reasons"] = [one.answer.finish_reason for one in self._choices]
        return facts


def _data(event: Completion) -> bytes:
    return b"data: " + event.text() + b"\n\n"


async def _never() -> Message:
    raise AssertionError
