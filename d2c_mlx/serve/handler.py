"""One request to a server: checked here, answered in mlx-lm's words."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import select
import socket
import time
from collections.abc import Callable
from email.message import Message
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from mlx_lm.generate import make_stop_sequences, make_text_state_machine
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.server import APIHandler, CompletionRequest, GenerationContext

from d2c_mlx.serve.requests import (
    Refusal,
    check_origin,
    check_token,
    read_body,
    read_request,
    read_tool_calls,
)
from d2c_mlx.serve.scheduler import Turn

if TYPE_CHECKING:
    import mlx.core as mx

    from d2c_mlx.serve.server import PackServer

__all__ = ["AUTO", "Handler"]

# The model that routes.
AUTO = "auto"
_log = logging.getLogger(__name__)
_CHAT = ("/v1/chat/completions", "/chat/completions")
_PATHS = (*_CHAT, "/v1/completions")
# Temperatures below are greedy: divided by them, what float16 holds would be infinite.
_COLD = 0.01


class Handler(APIHandler):
    """A connection; see `server.PackServer` for what it serves."""

    server: PackServer
    max_tokens: int
    path: str
    rfile: BinaryIO

    def __init__(self, request: Any, client_address: Any, server: PackServer) -> None:  # noqa: ANN401
        self.timeout = server.limits.seconds
        self.turn: Turn | None = None
        self.begun = False
        # Of the model: calls of tools that can be read, and the text of those that cannot.
        self._n_calls, self._unread = 0, ""
        super().__init__(server, request, client_address, server, system_fingerprint="d2c-mlx")

    def parse_request(self) -> bool:
        """As http.server does; what follows a `?` says nothing here."""
        good = super().parse_request()
        if good:
            self.path = self.path.partition("?")[0]
        return good

    def do_GET(self) -> None:
        """`/health`, `/v1/models`, `/v1/models/NAME`, `/metrics`."""
        try:
            self._check_client()
            if self.path == "/health":
                self.handle_health_check()
            elif self.path == "/metrics":
                self._reply(200, self.server.meters.text(), "text/plain; version=0.0.4")
            elif self.path == "/v1/models":
                models = [self._about(name) for name in self.server.names]
                self._json(200, {"object": "list", "data": models})
            elif self.path.startswith("/v1/models/"):
                name = unquote(self.path.removeprefix("/v1/models/"))
                self._check_model(name)
                self._json(200, self._about(name))
            else:
                raise Refusal(404, f"{self.path}: no such address; there is /v1/models")
        except Refusal as refusal:
            self._json(refusal.status, refusal.body)

    def do_OPTIONS(self) -> None:
        """What a browser asks first."""
        try:
            check_origin(self.headers, self.server.cli_args.allowed_origins)
            super().do_OPTIONS()
        except Refusal as refusal:
            self._json(refusal.status, refusal.body)

    def do_POST(self) -> None:
        """Check, then let mlx-lm's handler read it again."""
        try:
            self._check_client()
            if self.path not in _PATHS:
                raise Refusal(404, f"{self.path}: no such address; there is {_PATHS[0]}")
            raw = read_body(self.headers, self.rfile, self.server.limits.body_nbytes)
            body = read_request(raw, self.path in _CHAT)
            self._check_model(body["model"])
            self.server.check_numbers(body)
            raw = json.dumps(body).encode()
            self.headers.replace_header("Content-Length", str(len(raw)))
            self.rfile = io.BytesIO(raw)
            self._answer()
        except Refusal as refusal:
            self._json(refusal.status, refusal.body)
        except OSError:
            self.server.meters.vanished.inc()
            self.close_connection = True

    def _answer(self) -> None:
        try:
            super().do_POST()
        except (OSError, Refusal):
            raise
        except Exception as error:  # mlx-lm's handler works on what a model wrote
            _log.exception("a reply failed")
            self._fail(f"the reply failed ({type(error).__name__})")

    def validate_model_parameters(self) -> None:
        """mlx-lm's own checks, in our words."""
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise Refusal(400, str(error)) from None

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Put it in the queue, then reply as mlx-lm does."""
        self.turn = turn = self._turn(request, stop_words)
        self.server.scheduler.submit(turn)
        try:
            if turn.route:
                turn.wait_for_task(self._check_alive)
            self.requested_model = self.server.base_name if turn.task is None else turn.task
            request.turn = turn, self._context(turn), self._check_alive
            super().handle_completion(request, stop_words)
            self.server.meters.replies.labels("200").inc()
        except RuntimeError as error:
            self._fail(str(error))
        finally:
            turn.gone = True

    def generate_response(
        self,
        text: str,
        finish_reason: str | None,
        *counts: int | None,
        **more: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """mlx-lm counts pieces of text, see `_Answer`, and has log-probabilities in no stream."""
        assert self.turn
        # mlx-lm leaves out a call of a tool that cannot be read, and says that there is one.
        text, self._unread = text + self._unread, ""
        if finish_reason == "tool_calls" and not self._n_calls:
            finish_reason = "stop"
        if counts:
            counts = (counts[0], self.turn.n_tokens, *counts[2:])
        reply = super().generate_response(text, finish_reason, *counts, **more)
        told, self.turn.untold = self.turn.untold, []
        if self.logprobs:
            content = self.server.logprobs(told)
            reply["choices"][0]["logprobs"] = {"content": content} if content else None
        return reply

    def completion_usage_response(self, *counts: int | None) -> dict[str, Any]:
        """The same at the end of a stream."""
        assert self.turn
        return super().completion_usage_response(counts[0], self.turn.n_tokens, *counts[2:])

    def _turn(self, request: CompletionRequest, stop_words: list[str]) -> Turn:
        prompt = self.server.encode(request, self.chat_template_kwargs or {})
        most, context = self.server.limits.max_tokens, self.server.context
        if self.max_tokens > most:
            raise Refusal(400, f"max_tokens: found {self.max_tokens}, this server gives {most} at"
                          " most", "max_tokens")  # fmt: skip
        if context and not {"max_tokens", "max_completion_tokens"} & self.body.keys():
            self.max_tokens = max(1, min(self.max_tokens, context - len(prompt)))
        if not prompt or (context and len(prompt) + self.max_tokens > context):
            raise Refusal(
                400,
                f"the prompt has {len(prompt)} tokens; with max_tokens {self.max_tokens} the"
                f" model's context of {context} is too short",
            )
        processors = make_logits_processors(
            self.logit_bias, self.repetition_penalty, self.repetition_context_size,
            self.presence_penalty, self.presence_context_size, self.frequency_penalty,
            self.frequency_context_size,
        )  # fmt: skip
        name = self.requested_model
        task, route = self.server.models.get(name), None
        if name not in self.server.models:
            route = self.server.encode_to_route(request, prompt, self.chat_template_kwargs or {})
        stops = make_stop_sequences(self.server.tokenizer)
        return Turn(
            prompt, task, route, self.max_tokens, self._sampler(), processors, stops, stop_words
        )

    def _sampler(self) -> Callable[[mx.array], mx.array] | None:
        if self.temperature < _COLD:
            return None
        # All tokens are among as many; mlx-lm's sampler takes fewer only.
        top_k = self.top_k if self.top_k < self.server.vocabulary else 0
        return make_sampler(
            self.temperature, self.top_p, self.min_p, top_k=top_k,
            xtc_probability=self.xtc_probability, xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=self.server.kept_tokens,
        )  # fmt: skip

    def _context(self, turn: Turn) -> GenerationContext:
        tokenizer = self.server.tokenizer
        state = "normal"
        if tokenizer.has_thinking:
            starts, ends = (
                find(turn.prompt) for find in (tokenizer.rfind_think_start,
                                               tokenizer.rfind_think_end)
            )  # fmt: skip
            state = "reasoning" if starts > ends else state
        return GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling, has_thinking=tokenizer.has_thinking,
            tool_parser=self._read_tool_calls,
            text_sm=make_text_state_machine(tokenizer),
            # mlx-lm 0.32.0 has no such attribute.
            initial_state=getattr(tokenizer, "response_initial_state", None) or state,
            prompt=turn.prompt,
        )  # fmt: skip

    def _read_tool_calls(self, text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        try:
            found = read_tool_calls(self.server.tokenizer.tool_parser, text, tools)
        except ValueError:
            self._unread += text
            raise
        self._n_calls += len(found)
        return found

    def _check_client(self) -> None:
        check_origin(self.headers, self.server.cli_args.allowed_origins)
        check_token(self.headers, self.server.token)

    def _check_model(self, name: str) -> None:
        if name in self.server.names:
            return
        if name == AUTO:
            raise Refusal(404, "model: the pack has no router; fit one with d2c-mlx route PACK"
                          " --tasks DIR", "model")  # fmt: skip
        known = ", ".join(self.server.names[:20])
        raise Refusal(404, f"model: found {name[:80]!r}, expected one of {known}", "model")

    def _check_alive(self) -> None:
        """Raises OSError if the client has left, RuntimeError if nothing more will come."""
        if not self.server.scheduler.alive:
            raise RuntimeError("the server stops")
        # Other than `select.select`, for any number of open files.
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _fail(self, message: str) -> None:
        """Say that an answer ends here, in a stream that has begun or as a reply of its own."""
        body = Refusal(500, message).body
        if self.begun:
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
            return
        # Headers of the reply that it would have been.
        self._headers_buffer: list[bytes] = []
        self._json(500, body)

    def end_headers(self) -> None:
        """Send them."""
        super().end_headers()
        self.begun = True

    def send_error(self, code: int, message: str | None = None, _: str | None = None) -> None:
        """What http.server itself refuses, maybe before it has read any headers, as JSON."""
        self.headers = getattr(self, "headers", None) or Message()
        words = (message or HTTPStatus(code).phrase)[:200]
        if code == HTTPStatus.NOT_IMPLEMENTED:
            words = f"{self.command}: not supported, expected GET, POST or OPTIONS"
        self.close_connection = True
        self._json(code, Refusal(code, words).body)

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx"}

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._reply(status, json.dumps(content, ensure_ascii=False).encode(), "application/json")

    def _reply(self, status: int, content: bytes, kind: str) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self._set_cors_headers()
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        self.server.meters.replies.labels(str(status)).inc()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401  http.server's
        """Addresses and status, never what was said; to those who listen to this logger."""
        _log.info(format, *args)
