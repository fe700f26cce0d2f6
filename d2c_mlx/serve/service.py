"""The service behind the server: the pack on its model, its names, and the jobs of requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.generate import make_stop_sequences

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import context_length
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import Prefixes
from d2c_mlx.serve.requests import ChatRequest, LoadRequest, Request, RequestError, field_error
from d2c_mlx.serve.router import Router, load_router
from d2c_mlx.serve.sampling import Grammars, processors_of, sampler_of
from d2c_mlx.serve.scheduler import Job, Scheduler
from d2c_mlx.serve.text import Answer, Encoder
from d2c_mlx.utils.device import evaluation_memory
from d2c_mlx.utils.errors import InputError

__all__ = ["AUTO", "Limits", "PackService"]

# Requests for this model are routed.
AUTO = "auto"
# Tokens of an answer to a request that names no number.
_DEFAULT_TOKENS = 512
_MAX_NAME_NBYTES = 200


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
        adapter_nbytes: bytes of adapters in memory; None is half of what this device has for us.
        prefix_nbytes: bytes of keys and values of beginnings that prompts share; 0 keeps none.
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0
    drain_seconds: float = 10.0
    spare: int = 64
    adapter_nbytes: int | None = None
    prefix_nbytes: int = 500_000_000


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
        grammars: of answers that keep to a schema.
        vocabulary: number of token ids that the model knows.
        context: most tokens of prompt and answer together; None if the model does not say.
        base_name: name by which requests ask the base model.
    """

    def __init__(
        self,
        pack: Pack,
        base: BaseModel,
        router: Router | None = None,
        limits: Limits | None = None,
        directory: Path | None = None,
    ) -> None:
        """Load the adapters and start the scheduler; `close` stops it.

        Args:
            pack: verified.
            base: its base model without adapters; not to be used for anything else then.
            router: for requests to "auto"; None leaves that name out.
            limits: None is the defaults.
            directory: where adapters are looked for that a request names and nobody knows, and
                where others may be loaded from; None is nowhere.

        Raises:
            InputError: an adapter cannot be read, or is not of this base.
        """
        self.pack, self.router, self.limits = pack, router, limits or Limits()
        self.base_name: str = pack.manifest.model
        self.directory = directory and Path(os.path.abspath(directory))
        self.metrics, memory = Metrics(self.base_name), self.limits.adapter_nbytes
        prefixes = Prefixes(self.limits.prefix_nbytes)
        self.metrics.prefix_nbytes.set_function(lambda: prefixes.nbytes)
        memory = evaluation_memory() // 2 if memory is None else memory
        self.adapters = Adapters(base, pack, memory, self.metrics, prefixes)
        self.context = context_length(base.model.args)
        self.encoder = Encoder(base.tokenizer, self.context)
        _, self.vocabulary = base.dimensions
        self.grammars = Grammars(base.tokenizer, self.vocabulary)
        # XTC sampling never leaves these out.
        self._kept = (*base.tokenizer.encode("\n"), *base.tokenizer.eos_token_ids)
        self._stop_sequences = make_stop_sequences(base.tokenizer)
        batch, queue = self.limits.batch, self.limits.queue
        self.scheduler = Scheduler(self.adapters, self.metrics, batch, queue)

    @property
    def models(self) -> dict[str, str | None]:
        """Name in a request -> task, None for the base; a task hides a base of its name."""
        return {self.base_name: None, **{name: name for name in self.adapters.names}}

    @property
    def names(self) -> list[str]:
        """All names that requests may use, "auto" included if there is a router."""
        return list(dict.fromkeys([*self.models, *([AUTO] if self.router else [])]))

    def check_model(self, name: str) -> None:
        """Check that requests may ask for a model; raises RequestError (404) if it is none."""
        if name == AUTO and name not in self.names:
            text = "model: the pack has no router; fit one with d2c-mlx route PACK --tasks DIR"
            raise RequestError(404, text, "model")
        if name not in self.names:
            names = ", ".join(self.names[:20])
            raise RequestError(404, f"model: found {name[:80]!r}, expected one of {names}", "model")

    def jobs(self, request: Request, emits: Sequence[Callable[[Any], None]]) -> list[Job]:
        """The jobs that answer a request, one for each of `emits`; encoding may take a while.

        They are not submitted yet. A schema was checked by `grammars`.

        Raises:
            RequestError: (400, 404) no such model, a prompt that cannot be encoded or is too long,
                or too long an answer.
        """
        most = self.limits.batch + self.limits.queue
        if request.n > most:
            raise field_error("n", request.n, f"at most {most}, which may run and wait here")
        # Both may be replaced meanwhile.
        models, router, scale = self.models, self.router, None
        routing_prompt: list[int] = []
        prompts: dict[str | None, list[int]] = {}
        systems: dict[str | None, str] = dict(self.pack.systems.items())
        task: str | None = None
        if request.lora is not None or request.model in models:
            task, scale, router = *self._chosen(request, models), None
            prompt = self.encoder.encode(request, systems.get(task))
        else:
            if not router or request.model != AUTO:
                self.check_model(request.model)
            assert router is not None
            encoded = {
                system: self.encoder.encode(request, system)
                for system in {None, router.system, *systems.values()}
            }
            prompts = {name: encoded[systems.get(name)] for name in (None, *self.adapters.names)}
            # The one that may need most room; the router chooses among them.
            prompt, routing_prompt = max(prompts.values(), key=len), encoded[router.system]
        max_tokens = self._fit_answer(len(prompt), request.most_tokens)
        return [
            Job(
                prompt=prompt,
                task=task,
                max_tokens=max_tokens,
                emit=emit,
                stop_sequences=self._stop_sequences,
                sampler=sampler_of(request, self.vocabulary, self._kept, choice),
                processors=self._processors(request),
                stop_words=request.stop,
                router=router,
                routing_prompt=routing_prompt,
                prompts=prompts,
                scale=scale,
                n_top=request.top_logprobs,
            )
            for choice, emit in enumerate(emits)
        ]

    def _processors(self, request: Request) -> list[Any]:
        processors, schema = processors_of(request, self.vocabulary), request.schema_text
        return [*processors, self.grammars.processor(schema)] if schema else processors

    def _chosen(
        self, request: Request, models: Mapping[str, str | None]
    ) -> tuple[str | None, float | None]:
        """Task of a request, and its scale: by name, or by an adapter's id as with llama.cpp."""
        if request.lora is None:
            return models[request.model], None
        names = self.adapters.names
        # The task that is named stands for its adapter, else the first, as in GET /lora-adapters.
        tasks = {entry.id: name for name, entry in reversed([*names.items()])}
        if request.model in names:
            tasks[names[request.model].id] = request.model
        chosen: tuple[str | None, float | None] = None, None
        for choice in request.lora:
            if choice.id not in tasks:
                raise field_error("lora", choice.id, "an id of GET /lora-adapters")
            if choice.scale:
                chosen = tasks[choice.id], choice.scale
        return chosen

    def _fit_answer(self, n_prompt: int, asked: int | None) -> int:
        """Most tokens of the answer to a prompt of so many tokens.

        Args:
            n_prompt: tokens of the prompt.
            asked: what the request asks for; None is a default, shortened to what there is room
                for.

        Raises:
            RequestError: (400) more than the limit, or than the context has room for.
        """
        most, context = self.limits.max_tokens, self.context
        max_tokens = min(_DEFAULT_TOKENS, most) if asked is None else asked
        if max_tokens > most:
            words = f"max_tokens: found {max_tokens}, this server gives {most} at most"
            raise RequestError(400, words, "max_tokens")
        if context and asked is None:
            max_tokens = max(1, min(max_tokens, context - n_prompt))
        if not n_prompt or (context and n_prompt + max_tokens > context):
            words = f"the prompt has {n_prompt} tokens; with max_tokens {max_tokens} the model's"
            raise RequestError(400, f"{words} context of {context} is too short")
        return max_tokens

    def answer(self, request: Request, prompt: Sequence[int]) -> Answer:
        """An empty answer to a prompt."""
        tools = request.tools if isinstance(request, ChatRequest) else None
        return Answer(self.encoder.tokenizer, prompt, tools or None)

    def find_adapter(self, name: str) -> Future[None] | None:
        """Begin to load an adapter of `directory` that a request names; None if none is there.

        The future raises RequestError (400) if it is there and cannot be loaded.
        """
        if self.directory is None or name in (*self.names, AUTO) or _wrong_name(name):
            return None
        for path in (self.directory / name, self.directory / f"{name}.gguf"):
            if path.exists():
                return self.adapters.submit(partial(self._find, LoadRequest(lora_name=name), path))
        return None

    def _find(self, request: LoadRequest, path: Path) -> None:
        if request.lora_name in self.names:
            # Another request was first.
            return
        try:
            self._load(request, path)
        except InputError as error:
            words = f"LoRA adapter '{request.lora_name}' was found but could not be loaded."
            words = f"{words} {error.problems[0]}"
            raise RequestError(400, words, "model", "BadRequestError") from None

    def load_adapter(self, request: LoadRequest) -> Future[None]:
        """Begin to load an adapter by vLLM's rules; the future raises RequestError (400, 500).

        Raises:
            RequestError: the request is wrong (400), or nothing is at its path (404).
        """
        name, text = request.lora_name, request.lora_path
        if not name or not text:
            raise _refused("Both 'lora_name' and 'lora_path' must be provided.")
        if name in (self.base_name, AUTO):
            raise _refused(f"lora_name: {name[:80]!r} is another model of this server")
        if wrong := _wrong_name(name):
            raise _refused(f"lora_name: found {ascii(name[:80])}, {wrong}")
        words = f"Loading lora {name} failed: No adapter found for {text[:200]}"
        missing = RequestError(404, words, None, "NotFoundError")
        if self.directory is None:
            raise missing
        # Links are followed: whoever may write into the directory may also copy files there.
        path = Path(os.path.normpath(self.directory / text))
        if self.directory not in path.parents:
            words = f"lora_path: found {text[:200]!r}, expected a path inside the server's"
            raise _refused(f"{words} --adapter-dir")
        if not text.isprintable() or not os.path.exists(path):
            raise missing

        def load() -> None:
            try:
                self._load(request, path)
            except InputError as error:
                raise RequestError(500, error.problems[0], None, "InternalServerError") from None

        return self.adapters.submit(load)

    def _load(self, request: LoadRequest, path: Path) -> None:
        """Read an adapter and serve it; on the loader's thread."""
        base, name = self.adapters.model.base, request.lora_name

        def check() -> None:
            if name in self.adapters.names and not request.load_inplace:
                raise _refused(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the"
                    " adapter in place, set 'load_inplace' to True."
                )

        def add() -> None:
            check()
            self.adapters.add(name, entry, factors)

        check()
        read = partial(read_adapter, path, base.module_shapes, base.config)
        entry = Entry(name, path, read, request.pinned)
        factors = self.adapters.read(entry)
        self.scheduler.call(add).result()

    def unload_adapter(self, name: str) -> Future[Any]:
        """Stop serving an adapter by vLLM's rules; the inner future is done when nobody uses it.

        Raises:
            RequestError: (400) no name; the future raises it if there is no such adapter (404).
        """
        if not name:
            raise _refused("'lora_name' needs to be provided to unload a LoRA adapter.")

        def remove() -> Future[None]:
            if name not in self.adapters.names:
                words = f"The lora adapter '{name[:80]}' cannot be found."
                raise RequestError(404, words, None, "NotFoundError")
            return self.adapters.remove(name)

        return self.scheduler.call(remove)

    def set_scales(self, scales: Mapping[int, float]) -> Future[None]:
        """Set the scales of adapters by id, for requests that name none; those left out get 0.

        The future raises RequestError (400) for an id that no adapter has.
        """

        def change() -> None:
            entries = {entry.id: entry for entry in self.adapters.names.values()}
            for number in scales.keys() - entries.keys():
                raise field_error("id", number, "an id of GET /lora-adapters")
            for number, entry in entries.items():
                entry.scale = scales.get(number, 0.0)

        return self.scheduler.call(change)

    def reload_pack(self) -> Future[None]:
        """Read the pack again, and serve it in place of the one before.

        The future raises RequestError (409) if it is no pack any more, or one of another base.
        """
        return self.adapters.submit(self._reload)

    def _reload(self) -> None:
        old = self.pack
        try:
            new = load_pack(old.path)
            router = load_router(new)
        except InputError as error:
            raise RequestError(409, f"{error.problems[0]}; the pack before is served") from None
        was, now = old.manifest, new.manifest
        if (was.config_hash, was.weights_hash) != (now.config_hash, now.weights_hash):
            raise RequestError(409, f"{new.path}: is of another base model; start the server again")
        entries = self.adapters.entries_of(new)

        def swap() -> None:
            names = self.adapters.names.items()
            others = {name: entry for name, entry in names if name not in old.tasks}
            self.pack, self.router = new, router
            self.adapters.replace({**others, **entries})

        self.scheduler.call(swap).result()

    def close(self) -> None:
        """Stop; requests that do not end in `drain_seconds` end with an error."""
        self.scheduler.drain(self.limits.drain_seconds)
        self.scheduler.close()
        self.adapters.close()


def _wrong_name(name: str) -> str | None:
    """What is wrong with the name of an adapter, by the rules of packs; None if nothing is."""
    if not name or not name.isprintable() or {"/", "\\"} & set(name) or name[0] == ".":
        return "expected printable characters without slashes, and no dot in front"
    if len(name.encode()) > _MAX_NAME_NBYTES:
        return f"expected at most {_MAX_NAME_NBYTES} bytes"
    return None


def _refused(message: str) -> RequestError:
    """A refusal in vLLM's form."""
    return RequestError(400, message, None, "InvalidUserInput")
