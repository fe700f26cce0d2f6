"""The service behind the server: the pack on its model, its names, tokenizer and limits.

`handler` uses it for each connection, `server` hands it to them. It knows neither.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from mlx_lm.generate import make_text_state_machine
from mlx_lm.server import CompletionRequest, GenerationContext, process_message_content
from transformers import PreTrainedTokenizerBase

from d2c_mlx.models.tokenize import context_length
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.access import Access
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import MixedModel
from d2c_mlx.serve.requests import RequestError, field_error
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.scheduler import Scheduler

__all__ = ["AUTO", "Limits", "PackService"]

# Requests for this model are routed.
AUTO = "auto"
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
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0
    drain_seconds: float = 10.0


class PackService:
    """A pack at work on its base model, without HTTP. mlx-lm's handler takes it as its generator.

    Attributes:
        limits: see `Limits`.
        access: see `Access`.
        metrics: counters of what happened.
        scheduler: runs the requests, on a thread of its own.
        tokenizer: mlx-lm's, of the base model.
        vocabulary: number of token ids that the model knows.
        context: most tokens of prompt and answer together; None if the model does not say.
        xtc_special_tokens: token ids that XTC sampling never leaves out.
        base_name: name by which requests ask the base model.
        models: name in a request -> task, None for the base; a task hides a base of its name.
        systems: task -> system message of conversations that have none.
        names: all names that requests may use, "auto" included if there is a router.
        cli_args: options that mlx-lm's handler reads from its own command line.
    """

    def __init__(
        self,
        pack: Pack,
        model: MixedModel,
        router: Router | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Start the scheduler; `close` stops it.

        Args:
            pack: verified.
            model: the same pack on its base model.
            router: for requests to "auto"; None leaves that name out.
            access: None lets every client ask, and no web page.
            limits: None is the defaults.
        """
        self.access, self.limits, self.metrics = access or Access(), limits or Limits(), Metrics()
        self.tokenizer = model.base.tokenizer
        self.context = context_length(model.base.model.args)
        _, self.vocabulary = model.base.dimensions
        self.xtc_special_tokens = [*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids]
        self.base_name: str = pack.manifest.base.model
        self.models: dict[str, str | None] = {self.base_name: None, **{t: t for t in pack.tasks}}
        self.systems: Mapping[str | None, str] = dict(pack.systems.items())
        self.names = list(dict.fromkeys([*self.models, *([AUTO] if router else [])]))
        self.cli_args = Namespace(
            model=None, allowed_origins=list(self.access.origins), num_draft_tokens=0,
            max_tokens=min(512, self.limits.max_tokens), temp=0.0, top_p=1.0, top_k=0, min_p=0.0,
        )  # fmt: skip
        self._router = router
        # Tokenizers may not be used by two threads at once.
        self._encoding = Lock()
        self.scheduler = Scheduler(
            model, router, self.metrics, self.limits.batch, self.limits.queue
        )

    @property
    def is_healthy(self) -> bool:
        """True if it takes requests; mlx-lm's handler asks this for `/health`."""
        return self.scheduler.accepts

    def generate(
        self,
        request: CompletionRequest,
        _arguments: object,
        progress_callback: Callable[[int, int], None],
    ) -> tuple[GenerationContext, Iterator[Any]]:
        """Responses of the job that `Handler.handle_completion` submitted; mlx-lm's handler asks.

        Args:
            request: with `job`: the job, its context, and a check that the client is still there.
            progress_callback: called with (prompt tokens done, all prompt tokens).
        """
        job, context, check = request.job
        return context, job.responses(check, progress_callback)

    def encode(
        self, request: CompletionRequest, options: dict[str, Any], system: str | None = None
    ) -> list[int]:
        """Token ids of a request's prompt, the chat template applied.

        Args:
            request: of mlx-lm's handler.
            options: variables of the chat template.
            system: system message of a conversation that has none; None leaves it to the template.

        Raises:
            RequestError: (400) the template fails on these messages, or an option is none of its
                variables.
        """
        for name in options:
            if name in _RESERVED:
                raise field_error(
                    "chat_template_kwargs", name, "variables of the model's own template"
                )
        with self._encoding:
            if request.request_type == "text":
                # As `mlx_lm.generate`: a prompt that was made by the template has it already.
                bos = self.tokenizer.bos_token
                special = bos is None or not request.prompt.startswith(bos)
                return self.tokenizer.encode(request.prompt, add_special_tokens=special)
            if not self.tokenizer.has_chat_template:
                raise RequestError(400, "the model has no chat template; ask /v1/completions")
            try:
                messages = request.messages
                if system is not None and not any(one["role"] == "system" for one in messages):
                    messages = [{"role": "system", "content": system}, *messages]
                process_message_content(messages)
                return self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True,
                    tools=request.tools, **options,
                )  # fmt: skip
            except Exception as error:  # a template is a program of the model's authors
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                words = f"messages: the chat template fails ({why})"
                raise RequestError(400, words, "messages") from None

    def encode_to_route(
        self, request: CompletionRequest, options: dict[str, Any]
    ) -> tuple[list[int], dict[str | None, list[int]]]:
        """Token ids by which the router chooses the task of a request, and of its prompt then.

        Args:
            request: of mlx-lm's handler.
            options: variables of the chat template.

        Returns:
            The request encoded with the system message that the router was fitted on, and task ->
            the request with that of the task's rows.

        Raises:
            RequestError: see `encode`.
        """
        router = self._router.system if self._router else None
        known = {system: self.encode(request, options, system)
                 for system in {None, router, *self.systems.values()}}  # fmt: skip
        prompts = {task: known[self.systems.get(task)] for task in (None, *self.models.values())}
        return known[router], prompts

    def check_model(self, name: str) -> None:
        """Check that requests may ask for a model; raises RequestError (404) if it is none."""
        if name in self.names:
            return
        if name == AUTO:
            raise RequestError(404, "model: the pack has no router; fit one with d2c-mlx route PACK"
                               " --tasks DIR", "model")  # fmt: skip
        known = ", ".join(self.names[:20])
        raise RequestError(404, f"model: found {name[:80]!r}, expected one of {known}", "model")

    def fit_answer(self, n_prompt: int, max_tokens: int, given: bool) -> int:
        """Most tokens of the answer to a prompt of `n_prompt` tokens.

        Args:
            n_prompt: tokens of the prompt.
            max_tokens: what the request asks for, or the default.
            given: the request asks for it; a default is shortened to what the context has room for.

        Raises:
            RequestError: (400) more than the limit, or than the context has room for.
        """
        most, context = self.limits.max_tokens, self.context
        if max_tokens > most:
            raise RequestError(400, f"max_tokens: found {max_tokens}, this server gives {most} at"
                               " most", "max_tokens")  # fmt: skip
        if context and not given:
            max_tokens = max(1, min(max_tokens, context - n_prompt))
        if not n_prompt or (context and n_prompt + max_tokens > context):
            raise RequestError(
                400,
                f"the prompt has {n_prompt} tokens; with max_tokens {max_tokens} the model's"
                f" context of {context} is too short",
            )
        return max_tokens

    def generation_context(
        self, prompt: list[int], tool_parser: Callable[..., Any]
    ) -> GenerationContext:
        """How mlx-lm's handler splits the answer to a prompt into thoughts, tool calls and text."""
        tokenizer = self.tokenizer
        state = "normal"
        if tokenizer.has_thinking:
            starts, ends = (
                find(prompt) for find in (tokenizer.rfind_think_start, tokenizer.rfind_think_end)
            )
            state = "reasoning" if starts > ends else state
        return GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling, has_thinking=tokenizer.has_thinking,
            tool_parser=tool_parser, text_sm=make_text_state_machine(tokenizer),
            # mlx-lm 0.32.0 has no such attribute.
            initial_state=getattr(tokenizer, "response_initial_state", None) or state,
            prompt=prompt,
        )  # fmt: skip

    def logprobs(self, tokens: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        """Log-probabilities in the form of OpenAI's API, with the token's `id` besides.

        Args:
            tokens: token ids and their log-probabilities in nats.
        """
        entries = []
        for token, logprob in tokens:
            with self._encoding:
                text = self.tokenizer.decode([token])
            # A partial UTF-8 character has no bytes yet.
            content = None if "\ufffd" in text else list(text.encode())
            entries.append({"id": token, "token": text, "logprob": logprob, "bytes": content,
                            "top_logprobs": []})  # fmt: skip
        return entries

    def close(self) -> None:
        """Stop; requests that do not end in `drain_seconds` end with an error."""
        self.scheduler.drain(self.limits.drain_seconds)
        self.scheduler.close()
