"""The service behind the server: the pack on its model, its names, and the jobs of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from mlx_lm.generate import make_stop_sequences

from d2c_mlx.models.examples import context_length
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.jobs import Job, Limits, fit_answer
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.requests import Request, RequestError, field_error
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.sampling import Grammars, processors_of, sampler_of
from d2c_mlx.serve.scheduler import Scheduler
from d2c_mlx.serve.text import Answer, Encoder

__all__ = ["AUTO", "PackService"]

# Requests for this model are routed.
AUTO = "auto"


class PackService:
    """A pack at work on its base model, without HTTP.

    Attributes:
        pack: what is served now.
        adapters: its adapters, and those that came later.
        router: for requests to "auto"; None if there is none.
        limits: see `Limits`.
        directory: where further adapters may be read from; None if nowhere.
        metrics: counters of what happened.
        scheduler: runs the requests, on a thread of its own.
        encoder: the base model's tokenizer.
        vocabulary: number of token ids that the model knows.
        context: most tokens of prompt and answer together; None if the model does not say.
        base_name: name by which requests ask the base model.
    """

    def __init__(
        self,
        pack: Pack,
        adapters: Adapters,
        router: Router | None = None,
        limits: Limits | None = None,
        directory: Path | None = None,
    ) -> None:
        """Start the scheduler; `close` stops it.

        Args:
            pack: verified.
            adapters: those of the same pack on its base model.
            router: for requests to "auto"; None leaves that name out.
            limits: None is the defaults.
            directory: where adapters are looked for that a request names and nobody knows, and
                where others may be loaded from; None is nowhere.
        """
        self.pack, self.adapters, self.router = pack, adapters, router
        self.base_name: str = pack.manifest.model
        self.limits, self.metrics = limits or Limits(), Metrics(self.base_name)
        self.directory = directory and directory.resolve()
        base = adapters.model.base
        self.encoder = Encoder(base.tokenizer)
        self.context = context_length(base.model.args)
        _, self.vocabulary = base.dimensions
        # XTC sampling never leaves these out.
        self._kept = (*base.tokenizer.encode("\n"), *base.tokenizer.eos_token_ids)
        self._stop_sequences = make_stop_sequences(base.tokenizer)
        self._grammars: Grammars | None = None
        self._preparing = Lock()
        self.scheduler = Scheduler(adapters, self.metrics, self.limits)

    @property
    def models(self) -> dict[str, str | None]:
        """Name in a request -> task, None for the base; a task hides a base of its name."""
        return {self.base_name: None, **{name: name for name in self.adapters.names}}

    @property
    def names(self) -> list[str]:
        """All names that requests may use, "auto" included if there is a router."""
        return list(dict.fromkeys([*self.models, *([AUTO] if self.router else [])]))

    def jobs(self, request: Request, emits: Sequence[Callable[[Any], None]]) -> list[Job]:
        """The jobs that answer a request, one for each of `emits`; encoding may take a while.

        They are not submitted yet.

        Raises:
            RequestError: (400, 404) no such model, a prompt that cannot be encoded or is too long,
                too long an answer, or a schema that is none.
        """
        most = self.limits.batch + self.limits.queue
        if request.n > most:
            raise field_error("n", request.n, f"at most {most}, which may run and wait here")
        # Both may be replaced meanwhile.
        models, found = self.models, self.router
        router, scale = None, None
        routing_prompt: list[int] = []
        prompts: dict[str | None, list[int]] = {}
        systems: dict[str | None, str] = dict(self.pack.systems.items())
        if request.lora is not None or request.model in models:
            task, scale = self._chosen(request, models)
            prompt = self.encoder.encode(request, systems.get(task))
        else:
            if not found or request.model != AUTO:
                raise self._no_model(request.model)
            task, router = None, found
            known = {said: self.encoder.encode(request, said)
                     for said in {None, router.system, *systems.values()}}  # fmt: skip
            prompts = {one: known[systems.get(one)] for one in (None, *self.adapters.names)}
            # The one that may need most room; the router chooses among them.
            prompt, routing_prompt = max(prompts.values(), key=len), known[router.system]
        most = fit_answer(self.limits, self.context, len(prompt), request.most_tokens)
        return [
            Job(
                prompt, task, most, emit, self._stop_sequences,
                sampler_of(request, self.vocabulary, self._kept, i), self._processors(request),
                request.stop, router, routing_prompt, prompts, scale, request.top_logprobs,
            )
            for i, emit in enumerate(emits)
        ]  # fmt: skip

    def _processors(self, request: Request) -> list[Any]:
        found = processors_of(request)
        if request.response_format is None:
            return found
        with self._preparing:
            self._grammars = self._grammars or Grammars(self.encoder.tokenizer, self.vocabulary)
        return [*found, self._grammars.processor(request.response_format)]

    def _chosen(
        self, request: Request, models: Mapping[str, str | None]
    ) -> tuple[str | None, float | None]:
        """Task of a request, and its scale: by name, or by an adapter's id as with llama.cpp."""
        if request.lora is None:
            return models[request.model], None
        names = self.adapters.names
        # The task that is named stands for its adapter, else the first, as in GET /lora-adapters.
        known = {one.id: name for name, one in reversed([*names.items()])}
        if request.model in names:
            known[names[request.model].id] = request.model
        for number in request.lora:
            if number not in known:
                raise field_error("lora", number, "an id of GET /lora-adapters")
        chosen = [(known[number], scale) for number, scale in request.lora.items() if scale]
        return chosen[0] if chosen else (None, None)

    def answer(self, request: Request, prompt: Sequence[int]) -> Answer:
        """An empty answer to a prompt."""
        return Answer(self.encoder.tokenizer, prompt, getattr(request, "tools", None) or None)

    def check_model(self, name: str) -> None:
        """Check that requests may ask for a model; raises RequestError (404) if it is none."""
        if name not in self.names:
            raise self._no_model(name)

    def _no_model(self, name: str) -> RequestError:
        if name == AUTO:
            text = "model: the pack has no router; fit one with d2c-mlx route PACK --tasks DIR"
            return RequestError(404, text, "model")
        known = ", ".join(self.names[:20])
        return RequestError(404, f"model: found {name[:80]!r}, expected one of {known}", "model")

    def close(self) -> None:
        """Stop; requests that do not end in `drain_seconds` end with an error."""
        self.scheduler.drain(self.limits.drain_seconds)
        self.scheduler.close()
        self.adapters.close()
