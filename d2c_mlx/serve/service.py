"""The service behind the server: the pack on its model, its names, router and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from mlx_lm.generate import make_stop_sequences

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.tokenize import context_length
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.jobs import Job, Limits, fit_answer
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.requests import LoadRequest, Request, RequestError, field_error
from d2c_mlx.serve.router import Router, load_router
from d2c_mlx.serve.sampling import Grammars, processors_of, sampler_of
from d2c_mlx.serve.scheduler import Scheduler
from d2c_mlx.serve.text import Answer, Encoder
from d2c_mlx.utils.errors import InputError

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
        self.base_name: str = pack.manifest.base.model
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
        router, scale = None, None
        routing_prompt: list[int] = []
        prompts: dict[str | None, list[int]] = {}
        systems: dict[str | None, str] = dict(self.pack.systems.items())
        if request.lora is not None or request.model in self.models:
            task, scale = self._chosen(request)
            prompt = self.encoder.encode(request, systems.get(task))
        else:
            self.check_model(request.model)
            task, router = None, self.router
            assert router
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

    def _chosen(self, request: Request) -> tuple[str | None, float | None]:
        """Task of a request, and its scale: by name, or by an adapter's id as with llama.cpp."""
        if request.lora is None:
            return self.models[request.model], None
        known = {one.id: name for name, one in self.adapters.names.items()}
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
        if name in self.names:
            return
        if name == AUTO:
            raise RequestError(404, "model: the pack has no router; fit one with d2c-mlx route PACK"
                               " --tasks DIR", "model")  # fmt: skip
        known = ", ".join(self.names[:20])
        raise RequestError(404, f"model: found {name[:80]!r}, expected one of {known}", "model")

    def find(self, name: str) -> Future[None] | None:
        """Begin to load an adapter of `directory` that a request names; None if none is there.

        The future raises RequestError (400) if it is there and cannot be loaded.
        """
        if self.directory is None or name in self.names or Path(name).name != name:
            return None
        for path in (self.directory / name, self.directory / f"{name}.gguf"):
            with suppress(RequestError):
                found = self._inside(name, str(path))
                return self.adapters.submit(partial(self._find, name, found))
        return None

    def _find(self, name: str, path: Path) -> None:
        if name in self.names:
            # Another request was first.
            return
        try:
            self._load(path, LoadRequest(lora_name=name))
        except InputError as error:
            words = f"LoRA adapter '{name}' was found but could not be loaded. {error.problems[0]}"
            raise RequestError(400, words, "model", "BadRequestError") from None

    def load_adapter(self, request: LoadRequest) -> Future[None]:
        """Begin to load an adapter by vLLM's rules; the future raises RequestError (400, 500).

        Raises:
            RequestError: the request is wrong (400), or nothing is at its path (404).
        """
        name = request.lora_name
        if not name or not request.lora_path:
            raise _refused("Both 'lora_name' and 'lora_path' must be provided.")
        if name in (self.base_name, AUTO):
            raise _refused(f"lora_name: {name!r} is another model of this server")
        path = self._inside(name, request.lora_path)
        return self.adapters.submit(partial(self._load_asked, path, request))

    def _load_asked(self, path: Path, request: LoadRequest) -> None:
        try:
            self._load(path, request)
        except InputError as error:
            raise RequestError(500, error.problems[0], None, "InternalServerError") from None

    def _load(self, path: Path, request: LoadRequest) -> None:
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
        entry = Entry(path, read, request.pinned, name=name)
        factors = self.adapters.read(entry)
        self.scheduler.call(add).result()

    def _inside(self, name: str, text: str) -> Path:
        """A path in `directory`; raises RequestError (400, 404)."""
        missing = RequestError(
            404, f"Loading lora {name} failed: No adapter found for {text}", None, "NotFoundError"
        )
        if self.directory is None:
            raise missing
        try:
            path = (self.directory / text).resolve()
            inside, there = self.directory in path.parents, path.exists()
        except (OSError, ValueError):
            raise missing from None
        if not inside:
            raise _refused(f"lora_path: found {text[:200]!r}, expected a path inside the server's"
                           " --adapter-dir")  # fmt: skip
        if not there:
            raise missing
        return path

    def unload_adapter(self, name: str) -> Future[Any]:
        """Stop serving an adapter by vLLM's rules; the inner future is done when nobody uses it.

        Raises:
            RequestError: (400) no name; the future raises it if there is no such adapter (404).
        """
        if not name:
            raise _refused("'lora_name' needs to be provided to unload a LoRA adapter.")

        def remove() -> Future[None]:
            if name not in self.adapters.names:
                words = f"The lora adapter '{name}' cannot be found."
                raise RequestError(404, words, None, "NotFoundError")
            return self.adapters.remove(name)

        return self.scheduler.call(remove)

    def set_scales(self, scales: Mapping[int, float]) -> Future[None]:
        """Set the scales of adapters by id, for requests that name none; those left out get 0.

        The future raises RequestError (400) for an id that no adapter has.
        """

        def change() -> None:
            entries = {one.id: one for one in self.adapters.names.values()}
            for number in scales.keys() - entries.keys():
                raise field_error("id", number, "an id of GET /lora-adapters")
            for number, entry in entries.items():
                entry.scale = scales.get(number, 0.0)

        return self.scheduler.call(change)

    def reload(self) -> Future[None]:
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
        if new.manifest.base != old.manifest.base:
            raise RequestError(409, f"{new.path}: is of another base model; start the server again")
        entries = self.adapters.entries_of(new)

        def swap() -> None:
            names = self.adapters.names.items()
            others = {name: one for name, one in names if name not in old.tasks}
            self.pack, self.router = new, router
            self.adapters.replace({**others, **entries})

        self.scheduler.call(swap).result()

    def close(self) -> None:
        """Stop; requests that do not end in `drain_seconds` end with an error."""
        self.scheduler.drain(self.limits.drain_seconds)
        self.scheduler.close()
        self.adapters.close()


def _refused(message: str) -> RequestError:
    """A refusal in vLLM's form."""
    return RequestError(400, message, None, "InvalidUserInput")
