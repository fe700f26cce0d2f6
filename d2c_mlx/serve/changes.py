"""Adapters that come and go while a server runs: loaded, unloaded, scaled, or a pack read again."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.serve.adapters import Entry
from d2c_mlx.serve.requests import LoadRequest, RequestError, field_error
from d2c_mlx.serve.router import load_router
from d2c_mlx.serve.service import AUTO, PackService
from d2c_mlx.utils.errors import InputError

__all__ = ["find_adapter", "load_adapter", "reload_pack", "set_scales", "unload_adapter"]


def find_adapter(service: PackService, name: str) -> Future[None] | None:
    """Begin to load an adapter of `directory` that a request names; None if none is there.

    The future raises RequestError (400) if it is there and cannot be loaded.
    """
    if service.directory is None or name in service.names or Path(name).name != name:
        return None
    for path in (service.directory / name, service.directory / f"{name}.gguf"):
        with suppress(RequestError):
            found = _inside(service, name, str(path))
            return service.adapters.submit(partial(_find, service, name, found))
    return None


def _find(service: PackService, name: str, path: Path) -> None:
    if name in service.names:
        # Another request was first.
        return
    try:
        _load(service, path, LoadRequest(lora_name=name))
    except InputError as error:
        words = f"LoRA adapter '{name}' was found but could not be loaded. {error.problems[0]}"
        raise RequestError(400, words, "model", "BadRequestError") from None


def load_adapter(service: PackService, request: LoadRequest) -> Future[None]:
    """Begin to load an adapter by vLLM's rules; the future raises RequestError (400, 500).

    Raises:
        RequestError: the request is wrong (400), or nothing is at its path (404).
    """
    name = request.lora_name
    if not name or not request.lora_path:
        raise _refused("Both 'lora_name' and 'lora_path' must be provided.")
    if name in (service.base_name, AUTO):
        raise _refused(f"lora_name: {name!r} is another model of this server")
    path = _inside(service, name, request.lora_path)
    return service.adapters.submit(partial(_load_asked, service, path, request))


def _load_asked(service: PackService, path: Path, request: LoadRequest) -> None:
    try:
        _load(service, path, request)
    except InputError as error:
        raise RequestError(500, error.problems[0], None, "InternalServerError") from None


def _load(service: PackService, path: Path, request: LoadRequest) -> None:
    """Read an adapter and serve it; on the loader's thread."""
    base, name = service.adapters.model.base, request.lora_name

    def check() -> None:
        if name in service.adapters.names and not request.load_inplace:
            raise _refused(
                f"The lora adapter '{name}' has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True."
            )

    def add() -> None:
        check()
        service.adapters.add(name, entry, factors)

    check()
    read = partial(read_adapter, path, base.module_shapes, base.config)
    entry = Entry(path, read, request.pinned, name=name)
    factors = service.adapters.read(entry)
    service.scheduler.call(add).result()


def _inside(service: PackService, name: str, text: str) -> Path:
    """A path in `directory`; raises RequestError (400, 404)."""
    missing = RequestError(
        404, f"Loading lora {name} failed: No adapter found for {text}", None, "NotFoundError"
    )
    if service.directory is None:
        raise missing
    try:
        path = (service.directory / text).resolve()
        inside, there = service.directory in path.parents, path.exists()
    except (OSError, ValueError):
        raise missing from None
    if not inside:
        raise _refused(f"lora_path: found {text[:200]!r}, expected a path inside the server's"
                       " --adapter-dir")  # fmt: skip
    if not there:
        raise missing
    return path


def unload_adapter(service: PackService, name: str) -> Future[Any]:
    """Stop serving an adapter by vLLM's rules; the inner future is done when nobody uses it.

    Raises:
        RequestError: (400) no name; the future raises it if there is no such adapter (404).
    """
    if not name:
        raise _refused("'lora_name' needs to be provided to unload a LoRA adapter.")

    def remove() -> Future[None]:
        if name not in service.adapters.names:
            words = f"The lora adapter '{name}' cannot be found."
            raise RequestError(404, words, None, "NotFoundError")
        return service.adapters.remove(name)

    return service.scheduler.call(remove)


def set_scales(service: PackService, scales: Mapping[int, float]) -> Future[None]:
    """Set the scales of adapters by id, for requests that name none; those left out get 0.

    The future raises RequestError (400) for an id that no adapter has.
    """

    def change() -> None:
        entries = {one.id: one for one in service.adapters.names.values()}
        for number in scales.keys() - entries.keys():
            raise field_error("id", number, "an id of GET /lora-adapters")
        for number, entry in entries.items():
            entry.scale = scales.get(number, 0.0)

    return service.scheduler.call(change)


def reload_pack(service: PackService) -> Future[None]:
    """Read the pack again, and serve it in place of the one before.

    The future raises RequestError (409) if it is no pack any more, or one of another base.
    """
    return service.adapters.submit(partial(_reload, service))


def _reload(service: PackService) -> None:
    old = service.pack
    try:
        new = load_pack(old.path)
        router = load_router(new)
    except InputError as error:
        raise RequestError(409, f"{error.problems[0]}; the pack before is served") from None
    if new.manifest.base != old.manifest.base:
        raise RequestError(409, f"{new.path}: is of another base model; start the server again")
    entries = service.adapters.entries_of(new)

    def swap() -> None:
        names = service.adapters.names.items()
        others = {name: one for name, one in names if name not in old.tasks}
        service.pack, service.router = new, router
        service.adapters.replace({**others, **entries})

    service.scheduler.call(swap).result()


def _refused(message: str) -> RequestError:
    """A refusal in vLLM's form."""
    return RequestError(400, message, None, "InvalidUserInput")
