"""The service behind the server: the pack on its model, its names, and the jobs of requests."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.examples import context_length
from d2c_mlx.models.model import Model
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.requests import (
    Grammars,
    LoadRequest,
    Request,
    RequestError,
    field_error,
    processors_of,
    sampler_of,
)
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.scheduler import Job, Limits, Scheduler
from d2c_mlx.serve.text import Answer, Encoder
from d2c_mlx.utils.device import evaluation_memory
from d2c_mlx.utils.errors import InputError

# Requests for this model are routed.
AUTO = "auto"
# Tokens of an answer to a request that names no number.
_DEFAULT_TOKENS = 512


class PackService:
    """A pack at work on its base model, without HTTP.

    Attributes:
        adapters: those of the pack, and those that came later.
        scheduler: runs the requests, on a thread of its own.
        encoder: the base model's tokenizer.
        grammars: of answers that keep to a schema.
        base_name: name by which requests ask the base model.
    """

    def __init__(
        self,
        pack: Pack,
        base: Model,
        router: Router | None = None,
        limits: Limits | None = None,
        directory: Path | None = None,
    ) -> None:
        """Load the adapters and start the scheduler, whose `close` ends it.

        Args:
            pack: verified.
            base: its base model without adapters; not to be used for anything else then.
            router: for requests to "auto"; None leaves that name out.
            limits: None is the defaults.
            directory: of further adapters, which clients may load; None lets them change nothing.

        Raises:
            InputError: an adapter cannot be read, or is not of this base.
        """
        self.pack, self.router, self.limits = pack, router, limits or Limits()
        self.base_name: str = pack.manifest.model
        self.directory = directory and Path(os.path.abspath(directory))
        memory = self.limits.adapter_nbytes
        memory = evaluation_memory() // 2 if memory is None else memory
        self.adapters = Adapters(base, pack, memory)
        self._context = context_length(base.model.args)
        self.encoder = Encoder(base.tokenizer, self._context)
        _, self._vocabulary = base.dimensions
        self.grammars = Grammars(base.tokenizer, self._vocabulary)
        self.scheduler = Scheduler(self.adapters, self.limits)

    @property
    def names(self) -> list[str]:
        """All names that requests may use: the base's, of tasks, "auto" if there is a router."""
        auto = [AUTO] if self.router else []
        return list(dict.fromkeys([self.base_name, *self.adapters.names, *auto]))

    def no_model(self, name: str) -> RequestError:
        """The error (404) of a request for a model that is none of `names`."""
        words = f"model: found {name[:80]!r}, expected one of {', '.join(self.names[:20])}"
        if name == AUTO:
            words += "; fit a router with d2c-mlx route PACK --tasks DIR"
        return RequestError(404, words, "model")

    def answer(self, request: Request, emit: Callable[[Any], None]) -> Answer:
        """An empty answer to a request, with its job; encoding may take a while.

        The job is not submitted yet. A schema was checked by `grammars`.

        Raises:
            RequestError: (400, 404) no such model, a prompt that cannot be encoded or is too long,
                or too long an answer.
        """
        # They may be replaced meanwhile; a task hides a base of its name.
        names, router, route = self.adapters.names, self.router, None
        task = request.model if request.model in names else None
        if task is None and request.model != self.base_name:
            if router is None or request.model != AUTO:
                raise self.no_model(request.model)
            question = self.encoder.encode(request, router.system)
            self._most_tokens(request, len(question))
            model = self.adapters.base.model
            state = self.scheduler.call(lambda: router.states(model, [question])[0]).result()
            (nearest,), match = router.matches(state), router.best(state)
            # A task that was unloaded is the base's.
            task = match.task if match and match.task in names else None
            route = {
                "nearest": nearest.task,
                "similarity": round(nearest.similarity, 4),
                "threshold": round(router.threshold, 4),
            }
        prompt = self.encoder.encode(request, task and self.pack.manifest.systems.get(task))
        processors, schema = processors_of(request, self._vocabulary), request.schema_text
        if schema:
            processors.append(self.grammars.processor(schema))
        job = Job(
            prompt=prompt,
            task=task,
            max_tokens=self._most_tokens(request, len(prompt)),
            emit=emit,
            sampler=sampler_of(request, self._vocabulary),
            processors=processors,
            n_top=request.top_logprobs,
            route=route,
        )
        return Answer(self.encoder.tokenizer, request, job, task or self.base_name)

    def _most_tokens(self, request: Request, n_prompt: int) -> int:
        """Most tokens of the answer to a prompt of so many; raises RequestError (400)."""
        asked, most, context = request.max_tokens, self.limits.max_tokens, self._context
        max_tokens = min(_DEFAULT_TOKENS, most) if asked is None else asked
        if max_tokens > most:
            raise field_error("max_tokens", max_tokens, f"at most {most}")
        if context and asked is None:
            max_tokens = max(1, min(max_tokens, context - n_prompt))
        if not n_prompt or (context and n_prompt + max_tokens > context):
            words = f"the prompt has {n_prompt} tokens; with max_tokens {max_tokens} the model's"
            raise RequestError(400, f"{words} context of {context} is too short")
        return max_tokens

    def load_adapter(self, request: LoadRequest) -> Future[None]:
        """Begin to load an adapter of `directory`; the future raises RequestError (400).

        Raises:
            RequestError: (400, 404) the name may not be had, or nothing is at the path.
        """
        name, text = request.lora_name, request.lora_path
        bad = not name.isprintable() or {"/", "\\"} & set(name) or name[:1] in ("", ".")
        if bad or name in (self.base_name, AUTO) or len(name.encode()) > 200:
            expected = "a name of its own: printable, without slashes, no dot in front, and short"
            raise field_error("lora_name", ascii(name[:80]), expected)
        # Links are followed: whoever may write into the directory may also copy files there.
        path = Path(os.path.normpath((self.directory or Path()) / text))
        inside = self.directory in path.parents and text.isprintable()
        if not inside or not os.path.exists(path):
            words = f"lora_path: found {text[:200]!r}, expected an adapter in the server's"
            raise RequestError(404, f"{words} --adapter-dir", "lora_path")
        adapters, base = self.adapters, self.adapters.base
        entry = Entry(path, partial(read_adapter, path, base.module_shapes, base.config))

        def load() -> None:
            if name in adapters.names and not request.load_inplace:
                raise field_error("lora_name", name, "one that is not there, or load_inplace true")
            try:
                # Without room now it is read again for its first request.
                adapters.load(entry)
            except InputError as error:
                words = f"lora_path: the adapter cannot be loaded ({error.problems[0]})"
                raise RequestError(400, words, "lora_path") from None
            adapters.replace({**adapters.names, name: entry})

        return self.scheduler.call(load)

    def unload_adapter(self, request: LoadRequest) -> Future[None]:
        """Stop serving an adapter, which leaves memory when the last request by it has ended.

        The future raises RequestError (404) if there is no such adapter.
        """

        def remove() -> None:
            name, names = request.lora_name, dict(self.adapters.names)
            if names.pop(name, None) is None:
                words = f"lora_name: found {name[:80]!r}, expected an adapter that is loaded"
                raise RequestError(404, words, "lora_name")
            self.adapters.replace(names)

        return self.scheduler.call(remove)
