"""A pack behind OpenAI's API: `model` names a task, requests of all tasks run in one batch.

    d2c-mlx serve runs/first/pack

HTTP and the shape of replies are mlx-lm's `APIHandler`. In front of it every request is checked
(`api.py`); behind it the `Scheduler` generates, since mlx-lm's own thread empties its batch before
it changes an adapter, and then loads the model again.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import ThreadingHTTPServer
from threading import BoundedSemaphore, Lock
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationContext, process_message_content
from transformers import PreTrainedTokenizerBase

from d2c_mlx.models.tokenize import context_of
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.handler import AUTO, Handler
from d2c_mlx.serve.metrics import Meters
from d2c_mlx.serve.mixed_batch import MixedModel
from d2c_mlx.serve.requests import Refusal, odd
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.scheduler import Scheduler

__all__ = ["Limits", "PackServer"]

_log = logging.getLogger(__name__)
# Connections beyond those whose requests may run or wait.
_SPARE = 64
_PENALTY, _WINDOW = (float, -2, 2), (int, 0, 1_000_000)
# What is beyond would fail the batch, and so the requests of others: kind, least, most; 0 is taken.
_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100), "top_p": (float, 1e-6, 1), "min_p": (float, 0, 1),
    "xtc_probability": (float, 0, 1), "xtc_threshold": (float, 0, 0.5),
    "top_k": (int, 0, 2**31 - 1), "presence_penalty": _PENALTY, "presence_context_size": _WINDOW,
    "frequency_penalty": _PENALTY, "frequency_context_size": _WINDOW,
    "repetition_penalty": (float, 0.01, 100), "repetition_context_size": _WINDOW,
    "seed": (int, -(2**63), 2**63 - 1),
}  # fmt: skip
# What transformers would take for itself instead of giving it to the template: another template, or
# another form of the result.
_NOT_THE_TEMPLATES = inspect.signature(
    PreTrainedTokenizerBase.apply_chat_template
).parameters.keys() - {"documents", "kwargs"}
# Most that is added to a logit: float16 holds it, and no logit comes near.
_BIAS = 10_000


@dataclass(frozen=True)
class Limits:
    """What a server does not exceed.

    Attributes:
        batch: requests that run at a time.
        queue: requests that wait.
        body_nbytes: of a request.
        max_tokens: that a request may ask for.
        seconds: that a connection may say nothing.
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0


class PackServer(ThreadingHTTPServer):
    """Serves a pack on its base model; `serve_forever` runs it.

    Attributes:
        base_name: that requests for the base model use.
        models: names of requests -> task, None for the base model; a task hides a base of its name.
        names: all of them, and "auto" if there is a router.
        limits: see `Limits`.
        meters: what was counted.
        vocabulary: how many tokens the model knows.
        kept_tokens: that XTC never leaves out: those of a line's end, and of the answer's.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        pack: Pack,
        model: MixedModel,
        router: Router | None = None,
        *,
        token: str | None = None,
        origins: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        """Listen, and start the scheduler.

        Args:
            address: host and port; port 0 is any that is free.
            pack: verified.
            model: the same pack on its base model.
            router: for the model "auto"; None leaves that out.
            token: that requests must bring as `Authorization: Bearer`; None asks for none.
            origins: web pages that may ask, as browsers name them; others are refused.
            limits: None is the defaults.

        Raises:
            OSError: the address cannot be had.
        """
        self.limits = limits or Limits()
        self.token, self.meters, self.model = token, Meters(), model
        self.tokenizer = model.base.tokenizer
        self.context = context_of(model.base.model.args)
        _, self.vocabulary = model.base.dimensions
        self.kept_tokens = [*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids]
        self.router = router
        self.base_name: str = pack.manifest["base"]["model"]
        tasks = {task: task for task in pack.tasks}
        self.models: dict[str, str | None] = {self.base_name: None, **tasks}
        self.names = list(dict.fromkeys([*self.models, *([AUTO] if router else [])]))
        # What mlx-lm's handler reads of its own command line.
        self.cli_args = Namespace(
            model=None, allowed_origins=list(origins), num_draft_tokens=0,
            max_tokens=min(512, self.limits.max_tokens), temp=0.0, top_p=1.0, top_k=0, min_p=0.0,
        )  # fmt: skip
        self._encoding = Lock()
        self._connections = BoundedSemaphore(self.limits.batch + self.limits.queue + _SPARE)
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            self.address_family = found[0][0]
        # Before the address is tried: where that fails, `server_close` is called.
        self.scheduler = Scheduler(model, router, self.meters, self.limits.batch, self.limits.queue)
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """What to give to a client as its base URL."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        return f"http://[{name}]:{port}/v1" if ":" in name else f"http://{name}:{port}/v1"

    @property
    def is_healthy(self) -> bool:
        """For mlx-lm's handler."""
        return self.scheduler.alive

    def generate(
        self,
        request: CompletionRequest,
        _arguments: object,
        progress_callback: Callable[[int, int], None],
    ) -> tuple[GenerationContext, Iterator[Any]]:
        """For mlx-lm's handler: what `Handler.handle_completion` has put in the queue."""
        turn, context, check = request.turn
        return context, turn.responses(check, progress_callback)

    def check_numbers(self, body: dict[str, Any]) -> None:
        """Raises Refusal (400) for a field of sampling that is out of range.

        Args:
            body: of a request; whole numbers become floats where mlx-lm asks for these.
        """
        for name, (kind, least, most) in _RANGES.items():
            if name not in body:
                continue
            if not _between(body[name], kind, least, most):
                zero = "0, or " if least > 0 else ""
                what = "a whole number" if kind is int else "a number"
                raise odd(name, body[name], f"{zero}{what} from {least} to {most}")
            body[name] = kind(body[name])
        bias = body.get("logit_bias", {})
        if not isinstance(bias, dict):
            raise odd("logit_bias", bias, "an object: token id -> number")
        for token, value in bias.items():
            # int() would take more than digits.
            if not re.fullmatch("[0-9]{1,9}", token) or int(token) >= self.vocabulary:
                raise odd("logit_bias", token, f"token ids below {self.vocabulary}")
            if not _between(value, float, -_BIAS, _BIAS):
                raise odd("logit_bias", value, f"numbers from {-_BIAS} to {_BIAS}")

    def encode(self, request: CompletionRequest, options: dict[str, Any]) -> list[int]:
        """Token ids of a prompt, the chat template applied.

        Raises:
            Refusal: (400) the template does not take these messages, or an option is none of its.
        """
        for name in options:
            if name in _NOT_THE_TEMPLATES:
                raise odd("chat_template_kwargs", name, "variables of the model's own template")
        # Tokenizers may not be used by two threads at once.
        with self._encoding:
            if request.request_type == "text":
                # As `mlx_lm.generate`: a prompt that was made by the template has it already.
                bos = self.tokenizer.bos_token
                special = bos is None or not request.prompt.startswith(bos)
                return self.tokenizer.encode(request.prompt, add_special_tokens=special)
            if not self.tokenizer.has_chat_template:
                raise Refusal(400, "the model has no chat template; ask /v1/completions")
            try:
                process_message_content(request.messages)
                return self.tokenizer.apply_chat_template(
                    request.messages, add_generation_prompt=True, tokenize=True,
                    tools=request.tools, **options,
                )  # fmt: skip
            except Exception as error:  # a template is a program of the model's authors
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                words = f"messages: the chat template fails ({why})"
                raise Refusal(400, words, "messages") from None

    def encode_to_route(
        self, request: CompletionRequest, prompt: list[int], options: dict[str, Any]
    ) -> list[int]:
        """Token ids by which the router chooses: `prompt`, or with the system message it expects.

        Raises:
            Refusal: see `encode`.
        """
        system = self.router.system if self.router else None
        if system is None or request.request_type == "text":
            return prompt
        if any(message.get("role") == "system" for message in request.messages):
            return prompt
        messages = [{"role": "system", "content": system}, *request.messages]
        return self.encode(replace(request, messages=messages), options)

    def logprobs(self, tokens: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        """Tokens and their log-probabilities as OpenAI's API has them, and with mlx-lm's `id`."""
        found = []
        for token, logprob in tokens:
            with self._encoding:
                text = self.tokenizer.decode([token])
            # Of a part of a character nobody knows the bytes.
            content = None if "\ufffd" in text else list(text.encode())
            found.append({"id": token, "token": text, "logprob": logprob, "bytes": content,
                          "top_logprobs": []})  # fmt: skip
        return found

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A thread for a connection, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Serve a connection, and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Log what went wrong; a client that has left is nothing wrong."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("a request failed")

    def server_close(self) -> None:
        """Stop listening and generating."""
        super().server_close()
        self.scheduler.close()


def _between(value: object, kind: type, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return value == 0 or least <= value <= most
