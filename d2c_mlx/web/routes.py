"""The addresses of the server, each with its answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from d2c_mlx.serve.changes import load_adapter, reload_pack, set_scales, unload_adapter
from d2c_mlx.serve.requests import (
    LoadRequest,
    Request,
    RequestError,
    ScalesRequest,
    read_fields,
    read_json,
    read_object,
    read_request,
)
from d2c_mlx.serve.service import PackService
from d2c_mlx.web.front import Access, Front, read_body
from d2c_mlx.web.reply import Reply

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
    scales = read_json(await read_body(request, service))
    found = read_fields(ScalesRequest, {"scales": scales})
    await asyncio.wrap_future(set_scales(service, found.scales))
    return JSONResponse({"success": True})


async def _load(service: PackService, request: HttpRequest) -> Response:
    body = read_object(await read_body(request, service))
    if body.get("is_3d_lora_weight"):
        raise RequestError(400, "is_3d_lora_weight: not supported; leave it out")
    asked = read_fields(LoadRequest, body)
    await asyncio.wrap_future(load_adapter(service, asked))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: PackService, request: HttpRequest) -> Response:
    body = read_object(await read_body(request, service))
    name = read_fields(LoadRequest, body).lora_name
    left = await asyncio.wrap_future(unload_adapter(service, name))
    await asyncio.wrap_future(left)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _reload(service: PackService, _request: HttpRequest) -> Response:
    await asyncio.wrap_future(reload_pack(service))
    return JSONResponse({"success": True, "tasks": [*service.pack.tasks]})


class Completions:
    """A route that answers chats or texts, streamed or whole."""

    def __init__(self, service: PackService, chat: bool) -> None:
        """Answer chats, or texts."""
        self._service, self._chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; raises ConnectionAbortedError as soon as its client has left."""
        raw = await read_body(HttpRequest(scope, receive), self._service)
        request = read_request(raw, self._chat, self._service.vocabulary)
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

    async def _reply(self, request: Request, scope: Scope, send: Send) -> None:
        reply = Reply(self._service, request)
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
