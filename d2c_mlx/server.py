"""A pack behind OpenAI's API: `model` names a task, requests of all tasks run in one batch.

    d2c-mlx serve runs/first/pack

HTTP and the shape of replies are mlx-lm's `APIHandler`. In front of it every request is checked
(`api.py`); behind it the `Scheduler` generates, since mlx-lm's own thread empties its batch before
it changes an adapter, and then loads the model again.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from threading import BoundedSemaphore, Lock
from typing import Any

from jinja2 import TemplateError
from mlx_lm.server import CompletionRequest, GenerationContext, process_message_content

from d2c_mlx.api import Refusal
from d2c_mlx.handler import AUTO, Handler
from d2c_mlx.meters import Meters
from d2c_mlx.mixed import MixedModel
from d2c_mlx.pack import Pack
from d2c_mlx.routing import Router
from d2c_mlx.scheduler import Scheduler

__all__ = ["Limits", "PackServer"]

_log = logging.getLogger(__name__)
# Connections beyond those whose requests may run or wait.
_SPARE = 64


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
        self.context: int | None = getattr(model.base.model.args, "max_position_embeddings", None)
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

    def encode(self, request: CompletionRequest, options: dict[str, Any]) -> list[int]:
        """Token ids of a prompt, the chat template applied.

        Raises:
            Refusal: (400) the template does not take these messages.
        """
        # Tokenizers may not be used by two threads at once.
        with self._encoding:
            if request.request_type == "text":
                return self.tokenizer.encode(request.prompt)
            if not self.tokenizer.has_chat_template:
                raise Refusal(400, "the model has no chat template; ask /v1/completions")
            try:
                process_message_content(request.messages)
                return self.tokenizer.apply_chat_template(
                    request.messages, add_generation_prompt=True, tokenize=True,
                    tools=request.tools, **options,
                )  # fmt: skip
            except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise Refusal(400, f"messages: the chat template fails ({error})") from None

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
