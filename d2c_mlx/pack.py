"""The pack: what ships. Adapters, and a manifest that can be checked.

Plain packs hold directories that stock mlx-lm loads; compact ones hold all adapters at a few bits
in one file, and `unpack` makes plain directories of either (docs/packs.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapter import Adapter
from d2c_mlx.compact import read_compact, read_index
from d2c_mlx.errors import PackError
from d2c_mlx.files import hash_file
from d2c_mlx.reading import load_adapter
from d2c_mlx.rules import layout_problems
from d2c_mlx.strict import parse_json

__all__ = ["COMPACT", "FORMAT", "MANIFEST", "VERSIONS", "Pack", "load_pack"]

MANIFEST, FORMAT, COMPACT = "manifest.json", "d2c-mlx-pack", "compact.safetensors"
# Storage -> version of the format. A plain pack is what version 1 always was; its manifests of
# before there was another storage do not name it.
VERSIONS = {"plain": 1, "compact": 2}
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Pack:
    """A verified pack on disk.

    Attributes:
        path: its directory.
        manifest: content of `manifest.json`.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def storage(self) -> str:
        """`plain` or `compact`."""
        return self.manifest.get("storage", "plain")

    @property
    def tasks(self) -> dict[str, str | int | None]:
        """Task -> adapter: a directory relative to `path`, in a compact pack its position.

        None, in compact packs only: the base model serves the task as it is.
        """
        return self.manifest["tasks"]

    @property
    def adapters(self) -> dict[str | int, list[str]]:
        """Adapter, as in `tasks` -> the tasks that it serves."""
        served: dict[str | int, list[str]] = {}
        for task, adapter in self.tasks.items():
            if adapter is not None:
                served.setdefault(adapter, []).append(task)
        # cluster-2 before cluster-10.
        return dict(sorted(served.items(), key=lambda one: (len(str(one[0])), str(one[0]))))

    def files_of(self, adapter: str) -> dict[str, int]:
        """Files of a plain pack's adapter -> their bytes."""
        files = self.manifest["files"].items()
        return {name: entry["nbytes"] for name, entry in files if name.startswith(f"{adapter}/")}

    @property
    def nbytes(self) -> int:
        """Bytes of all adapter files."""
        return self.manifest["nbytes"]

    def merged(self, adapter: str | int) -> int:
        """How many adapters are in this one; removed ones stay in their merge and count.

        Args:
            adapter: as in `tasks`.
        """
        counts = self.manifest.get("merged")
        found = counts.get(str(adapter)) if isinstance(counts, dict) else None
        served = len(self.adapters[adapter])
        return found if type(found) is int and found > served else served

    @property
    def origins(self) -> dict[str, str]:
        """Task -> `owner/name@commit` of adapters from the hub; removed ones stay in a merge."""
        found = self.manifest.get("origins")
        return found if isinstance(found, dict) else {}

    @property
    def about(self) -> dict[str, Any]:
        """What a compact pack says of its base, as `write_compact_pack` takes it."""
        base = self.manifest["base"]
        return {"model": base["model"], "config_hash": base["config_sha256"],
                "n_layers": base["n_layers"], "dtype": _DTYPES[self.manifest["dtype"]]}  # fmt: skip

    def adapter_path(self, task: str) -> Path:
        """Directory to give to `mlx_lm.load(..., adapter_path=...)`.

        Raises:
            PackError: the pack does not serve this task, or is compact.
        """
        adapter = self._served_by(task)
        if self.storage == "compact":
            raise PackError(
                f"{self.path}: a compact pack has no adapter directories; write them with"
                f" d2c-mlx unpack {self.path} --output DIR"
            )
        return self.path / str(adapter)

    def load(self, task: str) -> Adapter | None:
        """The adapter that serves `task`, in 16 bit whatever the storage; None is the base model.

        Raises:
            PackError: the pack does not serve this task, or its file cannot be read.
        """
        adapter = self._served_by(task)
        if adapter is None:
            return None
        if isinstance(adapter, int):
            return _read(self, adapter)
        return load_adapter(self.adapter_path(task))

    def switch(self, model: Any, task: str | None) -> None:  # noqa: ANN401  any nn.Module
        """Make an mlx-lm model serve `task`, in place; None is the base model.

        Args:
            model: what `d2c_mlx.load` or `mlx_lm.load` gave. LoRAs that it has are dropped. A
                prompt cache from before belongs to the old adapter: begin a new one.
            task: one of `tasks`, or None.

        Raises:
            PackError: the pack does not serve this task, or its file cannot be read.
            AdapterError: the model is not the pack's base; it stays as it was.
        """
        # mlx_lm takes a second to import, and a pack is read without it.
        from d2c_mlx.serving import switch

        switch(model, None if task is None else self.load(task), self.path)

    def _served_by(self, task: str) -> str | int | None:
        if task not in self.tasks:
            raise PackError(f"{self.path}: no task {task!r}; it serves {', '.join(self.tasks)}")
        return self.tasks[task]


def _read(pack: Pack, adapter: int) -> Adapter | None:
    return read_compact(pack.path / COMPACT, adapter).adapter(_DTYPES[pack.manifest["dtype"]])


def load_pack(directory: Path) -> Pack:
    """Open a pack and verify every file's size and hash, in a plain pack the adapters' layout too.

    Raises:
        PackError: no pack, another version, files that are missing or differ, or adapters that
            stock mlx-lm or mlx-swift would not load.
    """
    path = directory / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackError(f"{path}: missing; is this a pack?") from None
    except ValueError as error:
        raise PackError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise PackError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    storage = manifest.get("storage", "plain")
    version = VERSIONS.get(storage) if isinstance(storage, str) else None
    if version is None:
        raise PackError(f"{path}: storage {storage!r}, expected one of {list(VERSIONS)}")
    if manifest.get("format") != FORMAT or manifest.get("format_version") != version:
        raise PackError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('format_version')!r},"
            f" expected {FORMAT!r} version {version}"
        )
    files, tasks = manifest.get("files"), manifest.get("tasks")
    if not isinstance(files, dict) or not isinstance(tasks, dict) or "nbytes" not in manifest:
        raise PackError(f"{path}: files, tasks or nbytes is missing; write the pack again")
    if storage == "plain":
        problems = [
            f"{path}: task {task!r} points to {folder!r}, whose files the manifest does not list"
            for task, folder in tasks.items()
            # "../x" would lead out of the pack, and `unpack` would write there.
            if f"{folder}/adapters.safetensors" not in files or not _inside(folder, 1)
        ]
    else:
        problems = _compact_problems(path, manifest)
    for name, entry in files.items():
        problems += _file_problems(directory, name, entry)
    if storage == "plain" and not problems:
        folders = sorted({str(folder) for folder in tasks.values()})
        problems = [line for folder in folders for line in layout_problems(directory / folder)]
    if problems:
        raise PackError(problems)
    pack = Pack(directory, manifest)
    if pack.storage == "compact":
        n_adapters = len(read_index(directory / COMPACT).names)
        wrong = [k for k in tasks.values() if k is not None and k not in range(n_adapters)]
        if wrong:
            raise PackError(f"{path}: tasks name adapter {wrong[0]}, the file holds {n_adapters}")
    return pack


def _inside(name: object, depth: int) -> bool:
    """Whether a manifest's name is a path of at most so many parts that stays in the pack."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    parts = name.split("/")
    # Asking for a longer name is an error of its own.
    short = all(len(part.encode()) <= 255 for part in parts)
    return short and len(parts) <= depth and not {"", ".", ".."} & set(parts)


def _file_problems(directory: Path, name: str, entry: object) -> list[str]:
    file = directory / name
    if not _inside(name, 2) or not isinstance(entry, dict):
        return [f"{directory / MANIFEST}: files: {ascii(name)} is no file of a pack"]
    if not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
        return [f"{file}: missing, but the manifest lists it"]
    if file.stat().st_size != entry.get("nbytes") or hash_file(file) != entry.get("sha256"):
        return [f"{file}: differs from the manifest's size or sha256; copy it again"]
    return []


def _compact_problems(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    base = manifest.get("base")
    if manifest.get("dtype") not in list(_DTYPES):  # it may be anything, a list too
        problems.append(f"{path}: dtype {manifest.get('dtype')!r}, expected one of {list(_DTYPES)}")
    if not isinstance(base, dict) or not isinstance(base.get("n_layers"), int):
        problems.append(f"{path}: base.n_layers is missing; write the pack again")
    if COMPACT not in manifest["files"]:
        problems.append(f"{path}: {COMPACT} is not among its files; write the pack again")
    problems += [
        f"{path}: task {task!r} points to {k!r}, expected the position of an adapter or null"
        for task, k in manifest["tasks"].items()
        if k is not None and type(k) is not int
    ]
    return problems
