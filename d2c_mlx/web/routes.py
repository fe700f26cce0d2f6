"""The addresses of the server, each with its answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from d2c_mlx.serve.requests import (
    ChatRequest,
    LoadRequest,
    RequestError,
    TextRequest,
    read_fields,
    read_object,
    read_request,
    read_scales,
)
from d2c_mlx.serve.scheduler import STARTED, Job
from d2c_mlx.serve.service import PackService
from d2c_mlx.serve.text import Answer, Piece

__all__ = ["addresses"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
# Of a body that is too large, so many bytes are read, for so long.
_MAX_DROPPED, _DROP_SECONDS = 32_000_000, 1.0


def addresses(page: bool, changes: bool) -> list[tuple[str, str, Callable[..., Any]]]:
    """Method, path and answer of every address: a function of the service and a request."""

    def change(path: str, answer: Callable[..., Any]) -> tuple[str, str, Callable[..., Any]]:
        return "POST", path, answer if changes else _no_changes

    chat, text = partial(_complete, chat=True), partial(_complete, chat=False)
    return [
        ("GET", "/health", _ready),
        ("GET", "/health/ready", _ready),
        ("GET", "/health/live", partial(_ready, alive=True)),
        ("GET", "/metrics", _metrics),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:path}", _model),
        ("GET", "/lora-adapters", _adapters),
        change("/lora-adapters", _scale),
        change("/v1/load_lora_adapter", _load),
        change("/v1/unload_lora_adapter", _unload),
        change("/v1/reload", _reload),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/chat/completions", chat),
        ("POST", "/v1/completions", text),
        *([("GET", "/", _page)] if page else []),
    ]


async def _page(_service: PackService, _request: Request) -> Response:
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
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(page, headers=headers, media_type="text/html")


async def _ready(service: PackService, _request: Request, alive: bool = False) -> Response:
    good = service.scheduler.alive if alive else service.scheduler.accepts
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


async def _metrics(service: PackService, _request: Request) -> Response:
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


async def _models(service: PackService, _request: Request) -> Response:
    data = [_describe(service, name) for name in service.names]
    return JSONResponse({"object": "list", "data": data})


async def _model(service: PackService, request: Request) -> Response:
    name = request.path_params["name"]
    service.check_model(name)
    return JSONResponse(_describe(service, name))


def _describe(service: PackService, name: str) -> dict[str, Any]:
    """An entry of `/v1/models`; `root` and `parent` are vLLM's."""
    entry, base = service.adapters.names.get(name), service.base_name
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx"}
    return {**about, "root": str(entry.path) if entry else name, "parent": base if entry else None}


async def _adapters(service: PackService, _request: Request) -> Response:
    """llama.cpp's list; the first task of an adapter stands for all."""
    entries = {entry: name for name, entry in reversed([*service.adapters.names.items()])}
    rows = []
    for entry, name in sorted(entries.items(), key=lambda item: item[0].id):
        row = {"id": entry.id, "path": str(entry.path), "scale": entry.scale}
        rows.append({**row, "task_name": name, "prompt_prefix": ""})
    return JSONResponse(rows)


async def _no_changes(_service: PackService, request: Request) -> Response:
    words = "adapters do not change; start the server with --allow-changes and --token"
    raise RequestError(404, f"{request.url.path}: {words}")


async def _scale(service: PackService, request: Request) -> Response:
    scales = read_scales(await _body(service, request))
    await asyncio.wrap_future(service.set_scales(scales))
    return JSONResponse({"success": True})


async def _load(service: PackService, request: Request) -> Response:
    asked = read_fields(LoadRequest, read_object(await _body(service, request)))
    await asyncio.wrap_future(service.load_adapter(asked))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: PackService, request: Request) -> Response:
    name = read_fields(LoadRequest, read_object(await _body(service, request))).lora_name
    left: Any = await asyncio.wrap_future(service.unload_adapter(name))
    await asyncio.wrap_future(left)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _reload(service: PackService, _request: Request) -> Response:
    await asyncio.wrap_future(service.reload_pack())
    return JSONResponse({"success": True, "tasks": [*service.pack.tasks]})


async def _body(service: PackService, request: Request) -> bytes:
    """Read the body of a request; raises RequestError (413) if it is too large."""
    most, body, size = service.limits.body_nbytes, bytearray(), 0
    length = int(request.headers.get("Content-Length", "0"))
    with suppress(TimeoutError):
        # What is too large is read and dropped: unread bytes would reset the connection before
        # the client has read why.
        async with asyncio.timeout(_DROP_SECONDS if length > most else None):
            async for chunk in request.stream():
                size += len(chunk)
                body += chunk if size <= most else b""
                if size > _MAX_DROPPED:
                    break
    size = max(size, length)
    if size > most:
        raise RequestError(413, f"the body has {size} bytes, this server takes {most:,}")
    return bytes(body)


async def _complete(service: PackService, request: Request, chat: bool) -> Response:
    """Answer a chat or a text, whole or streamed, until its client leaves."""
    asked = read_request(await _body(service, request), chat)
    reply = request.scope["state"]["reply"] = _Reply(service, asked)
    try:
        await _while_connected(request, reply.start())
        if not asked.stream:
            content = await _while_connected(request, reply.whole())
            return JSONResponse(content, headers=reply.route())
    except RuntimeError as error:
        raise RequestError(500, str(error)) from None
    headers = {"Cache-Control": "no-cache", **reply.route()}
    return StreamingResponse(reply.stream(), headers=headers, media_type="text/event-stream")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work; raises ClientDisconnect as soon as the client has left."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Reply:
    """The reply to a request, as its jobs run; whoever made it cancels it at the end."""

    def __init__(self, service: PackService, request: ChatRequest | TextRequest) -> None:
        self._service, self._request = service, request
        self._chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4()}"
        self._created = int(time.time())
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._answers: list[Answer] = []

    async def start(self) -> None:
        """Queue the jobs, and wait until one is in the batch; raises RequestError."""
        loop, service, request = asyncio.get_running_loop(), self._service, self._request

        def emit(index: int, event: object) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        loading = service.find_adapter(request.model)
        if loading:
            await asyncio.wrap_future(loading)
        if request.schema_text:
            await service.grammars.check(request.schema_text)
        emits = [partial(emit, i) for i in range(request.n)]
        jobs = await run_in_threadpool(service.jobs, request, emits)
        service.scheduler.submit(*jobs)
        self._jobs, self._answers = jobs, [service.answer(request, job.prompt) for job in jobs]
        while (await self._next())[1] != STARTED:
            pass

    def cancel(self) -> None:
        """End the jobs, as their client has left or has its answer."""
        for job in self._jobs:
            job.cancelled = True

    async def _next(self) -> tuple[int, Any]:
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Piece):
            self._answers[index].add(event)
        return index, event

    async def whole(self) -> dict[str, Any]:
        """The body of the reply, when all answers have ended."""
        left = len(self._jobs)
        while left:
            left -= (await self._next())[1] is None
        return self._event([*range(len(self._jobs))], with_usage=True)

    async def stream(self) -> AsyncIterator[bytes]:
        """The answers piece by piece, as events."""
        left, ended = len(self._jobs), False
        try:
            while left:
                index, event = await self._next()
                left -= event is None
                answer = self._answers[index]
                if isinstance(event, tuple):
                    yield b": keepalive %d/%d\n\n" % event
                elif event is None or (answer.has_news and not answer.finish_reason):
                    yield _data(self._event([index]))
            if self._request.stream_options.include_usage:
                yield _data(self._event([], with_usage=True))
            ended = True
            yield b"data: [DONE]\n\n"
        except Exception as error:  # a model's words may be anything
            ended = True
            if not isinstance(error, RuntimeError | RequestError):
                _log.exception("a reply failed")
                error = RuntimeError(f"the reply failed ({type(error).__name__})")
            yield _data(RequestError(500, str(error)).body)
        finally:
            if not ended:
                self._service.metrics.disconnected.inc()

    def route(self) -> dict[str, str]:
        """The header with the router's finding, empty where no router was asked."""
        route = self._jobs[0].route
        return {"X-D2C-Route": json.dumps(route)} if route else {}

    def _event(self, indices: Sequence[int], with_usage: bool = False) -> dict[str, Any]:
        """The reply, or an event of a stream, with what is new of some answers."""
        asked, job, kind = self._request, self._jobs[0], "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        takes = self._chat, asked.stream, asked.logprobs
        choices = [{"index": i, **self._answers[i].take(*takes)} for i in indices]
        event = {"id": self._id, "object": kind, "created": self._created, "choices": choices}
        event["model"] = self._service.metrics.name(job.task)
        event["system_fingerprint"] = "d2c-mlx"
        if with_usage:
            n_prompt, n_answer = len(job.prompt), sum(x.n_tokens for x in self._answers)
            event["usage"] = {
                "prompt_tokens": n_prompt,
                "prompt_tokens_details": {"cached_tokens": job.n_cached},
                "completion_tokens": n_answer,
                "total_tokens": n_prompt + n_answer,
            }
        return event

    def facts(self) -> dict[str, Any]:
        """Numbers and names of the reply for the log, no text of it."""
        facts = {"id": self._id, "model": self._request.model[:80], "stream": self._request.stream}
        for job in self._jobs[:1]:
            facts |= {
                "task": self._service.metrics.name(job.task),
                "prompt_tokens": len(job.prompt),
                "tokens": sum(answer.n_tokens for answer in self._answers),
                "cached_tokens": job.n_cached,
                "finish_reasons": [answer.finish_reason for answer in self._answers],
            }
        return facts


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
