"""The service behind the server: the pack on its model, its names, tokenizer and limits.

`routes` asks it for each request, `server` hands it to them. It knows neither.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from threading import Lock
from typing import Any

from mlx_lm.generate import make_stop_sequences
from transformers import PreTrainedTokenizerBase

from d2c_mlx.models.tokenize import context_length
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.answers import Answer
from d2c_mlx.serve.api import ChatRequest, Request, RequestError, TextRequest, field_error
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import MixedModel
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.sampling import processors_of, sampler_of
from d2c_mlx.serve.scheduler import Job, Piece, Scheduler

__all__ = ["AUTO", "Limits", "PackService"]

# Requests for this model are routed.
AUTO = "auto"
# Tokens of an answer to a request that names no number.
_DEFAULT_TOKENS = 512
# Arguments that transformers would take for itself instead of passing them to the template: another
# template, or another form of the result.
_RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents", "kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        batch: requests that run at a time.
        queue: requests that wait.
        body_nbytes: bytes of a request's body.
        max_tokens: tokens of an answer that a request may ask for.
        seconds: in which a whole request must come, and a client take a part of its answer.
        drain_seconds: in which requests that run may end when the server stops.
        spare: connections beside those whose requests run or wait.
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0
    drain_seconds: float = 10.0
    spare: int = 64


class PackService:
    """A pack at work on its base model, without HTTP.

    Attributes:
        limits: see `Limits`.
        metrics: counters of what happened.
        scheduler: runs the requests, on a thread of its own.
        tokenizer: mlx-lm's, of the base model.
        vocabulary: number of token ids that the model knows.
        context: most tokens of prompt and answer together; None if the model does not say.
        base_name: name by which requests ask the base model.
        models: name in a request -> task, None for the base; a task hides a base of its name.
        systems: task -> system message of conversations that have none.
        names: all names that requests may use, "auto" included if there is a router.
    """

    def __init__(
        self,
        pack: Pack,
        model: MixedModel,
        router: Router | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Start the scheduler; `close` stops it.

        Args:
            pack: verified.
            model: the same pack on its base model.
            router: for requests to "auto"; None leaves that name out.
            limits: None is the defaults.
        """
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.tokenizer = model.base.tokenizer
        self.context = context_length(model.base.model.args)
        _, self.vocabulary = model.base.dimensions
        # XTC sampling never leaves these out.
        self._kept = (*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids)
        self._stop_sequences = make_stop_sequences(self.tokenizer)
        self.base_name: str = pack.manifest.base.model
        self.models: dict[str, str | None] = {self.base_name: None, **{t: t for t in pack.tasks}}
        self.systems: Mapping[str | None, str] = dict(pack.systems.items())
        self.names = list(dict.fromkeys([*self.models, *([AUTO] if router else [])]))
        self._router = router
        # Tokenizers may not be used by two threads at once.
        self._encoding = Lock()
        self.scheduler = Scheduler(
            model, router, self.metrics, self.limits.batch, self.limits.queue
        )

    def job(self, request: Request, emit: Callable[[Any], None]) -> Job:
        """The job that answers a request; it is not submitted yet. Encoding may take a while.

        Raises:
            RequestError: (400, 404) no such model, a prompt that cannot be encoded or is too long,
                or too long an answer.
        """
        self.check_model(request.model)
        routing_prompt: list[int] | None = None
        prompts: dict[str | None, list[int]] = {}
        if request.model in self.models:
            task = self.models[request.model]
            prompt = self.encode(request, self.systems.get(task))
        else:
            task = None
            routing_prompt, prompts = self._encode_to_route(request)
            prompt = max(prompts.values(), key=len)
        return Job(
            prompt, task, self._fit_answer(len(prompt), request.most_tokens), emit,
            self._stop_sequences, sampler_of(request, self.vocabulary, self._kept),
            processors_of(request), request.stop, routing_prompt, prompts,
        )  # fmt: skip

    def encode(self, request: Request, system: str | None = None) -> list[int]:
        """Token ids of a request's prompt, the chat template applied.

        Args:
            request: a chat or a text.
            system: system message of a conversation that has none; None leaves it to the template.

        Raises:
            RequestError: (400) the template fails on these messages, or an option is none of its
                variables.
        """
        if isinstance(request, TextRequest):
            # As `mlx_lm.generate`: a prompt that was made by the template has it already.
            bos = self.tokenizer.bos_token
            special = bos is None or not request.prompt.startswith(bos)
            with self._encoding:
                return self.tokenizer.encode(request.prompt, add_special_tokens=special)
        assert isinstance(request, ChatRequest)
        for name in request.chat_template_kwargs:
            if name in _RESERVED:
                raise field_error(
                    "chat_template_kwargs", name, "variables of the model's own template"
                )
        if not self.tokenizer.has_chat_template:
            raise RequestError(400, "the model has no chat template; ask /v1/completions")
        try:
            messages = [_plain_message(one) for one in request.messages]
            if system is not None and not any(one["role"] == "system" for one in messages):
                messages = [{"role": "system", "content": system}, *messages]
            with self._encoding:
                return self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True,
                    tools=request.tools or None, **request.chat_template_kwargs,
                )  # fmt: skip
        except Exception as error:  # a template is a program of the model's authors
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            words = f"messages: the chat template fails ({why})"
            raise RequestError(400, words, "messages") from None

    def _encode_to_route(self, request: Request) -> tuple[list[int], dict[str | None, list[int]]]:
        """Token ids by which the router chooses the task of a request, and of its prompt then.

        Returns:
            The request encoded with the system message that the router was fitted on, and task ->
            the request with that of the task's rows.
        """
        router = self._router.system if self._router else None
        known = {system: self.encode(request, system)
                 for system in {None, router, *self.systems.values()}}  # fmt: skip
        prompts = {task: known[self.systems.get(task)] for task in (None, *self.models.values())}
        return known[router], prompts

    def name_of(self, task: str | None) -> str:
        """The name of a task in a reply; None is the base model."""
        return self.base_name if task is None else task

    def answer(self, request: Request, prompt: Sequence[int]) -> Answer:
        """An empty answer to a prompt."""
        return Answer(self.tokenizer, prompt, getattr(request, "tools", None) or None)

    def check_model(self, name: str) -> None:
        """Check that requests may ask for a model; raises RequestError (404) if it is none."""
        if name in self.names:
            return
        if name == AUTO:
            raise RequestError(404, "model: the pack has no router; fit one with d2c-mlx route PACK"
                               " --tasks DIR", "model")  # fmt: skip
        known = ", ".join(self.names[:20])
        raise RequestError(404, f"model: found {name[:80]!r}, expected one of {known}", "model")

    def _fit_answer(self, n_prompt: int, asked: int | None) -> int:
        """Most tokens of the answer to a prompt of `n_prompt` tokens.

        A default is shortened to what the context has room for.

        Raises:
            RequestError: (400) more than the limit, or than the context has room for.
        """
        most, context = self.limits.max_tokens, self.context
        max_tokens = min(_DEFAULT_TOKENS, most) if asked is None else asked
        if max_tokens > most:
            raise RequestError(400, f"max_tokens: found {max_tokens}, this server gives {most} at"
                               " most", "max_tokens")  # fmt: skip
        if context and asked is None:
            max_tokens = max(1, min(max_tokens, context - n_prompt))
        if not n_prompt or (context and n_prompt + max_tokens > context):
            raise RequestError(
                400,
                f"the prompt has {n_prompt} tokens; with max_tokens {max_tokens} the model's"
                f" context of {context} is too short",
            )
        return max_tokens

    def logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Log-probabilities in the form of OpenAI's API, with the token's `id` besides."""
        entries = []
        for one in pieces:
            with self._encoding:
                text = self.tokenizer.decode([one.token])
            # A partial UTF-8 character has no bytes yet.
            content = None if "\ufffd" in text else list(text.encode())
            entries.append({"id": one.token, "token": text, "logprob": one.logprob,
                            "bytes": content, "top_logprobs": []})  # fmt: skip
        return entries

    def close(self) -> None:
        """Stop; requests that do not end in `drain_seconds` end with an error."""
        self.scheduler.drain(self.limits.drain_seconds)
        self.scheduler.close()


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates read it: content is a string, arguments of calls are objects."""
    plain, content = deepcopy(message), message.get("content")
    parts = content if isinstance(content, list) else []
    plain["content"] = "".join(part["text"] for part in parts) if parts else content or ""
    for call in plain.get("tool_calls") or ():
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), str) and function["arguments"]:
            function["arguments"] = json.loads(function["arguments"])
    return plain
