"""The pack, which is what ships: adapters, and a manifest that can be checked.

Plain packs hold directories that stock mlx-lm loads; compact ones hold all adapters at a few bits
in one file, and `export` writes plain directories of either (docs/concepts/pack-file.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import read_gguf
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.models.resolve import check_weights, resolve_exact_base
from d2c_mlx.packs.checks import problems_inside, read_manifest
from d2c_mlx.packs.manifest import (
    COMPACT,
    FORMAT,
    MANIFEST,
    VERSIONS,
    CompactManifest,
    GgufManifest,
    PackInfo,
    PlainManifest,
)
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import copy_file, file_state, hash_file, old_dir, restore_dir
from d2c_mlx.utils.lock import held

__all__ = [
    "COMPACT",
    "FORMAT",
    "MANIFEST",
    "VERSIONS",
    "Pack",
    "PackInfo",
    "load_pack",
    "pack_directory",
]


@dataclass(frozen=True)
class Pack:
    """A verified pack on disk; `load_pack` makes one.

    Attributes:
        path: its directory.
        manifest: what its `manifest.json` says.
        states: file -> its `file_state` when it was verified.
    """

    path: Path
    manifest: PlainManifest | CompactManifest | GgufManifest
    states: Mapping[str, tuple[int, ...] | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def storage(self) -> Literal["plain", "compact", "gguf"]:
        """`plain`, `compact` or `gguf`."""
        return self.manifest.storage

    @property
    def tasks(self) -> Mapping[str, str | int | None]:
        """Task -> adapter: a directory or .gguf relative to `path`, in a compact pack its position.

        None, not in plain packs: the base model serves the task as it is.
        """
        return self.manifest.tasks

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
        files = self.manifest.files.items()
        return {name: entry.nbytes for name, entry in files if name.startswith(f"{adapter}/")}

    @property
    def nbytes(self) -> int:
        """Bytes of all adapter files."""
        return self.manifest.nbytes

    def merged(self, adapter: str | int) -> int:
        """Number of adapters in this one; removed ones stay in their merge and count.

        Args:
            adapter: as in `tasks`.
        """
        return self._merged(adapter, self.adapters[adapter])

    def _merged(self, adapter: str | int, tasks: Sequence[str]) -> int:
        return max(self.manifest.merged.get(str(adapter), 0), len(tasks))

    @property
    def origins(self) -> Mapping[str, str]:
        """Task -> `owner/name@commit` of adapters from the hub; removed ones stay in a merge."""
        return self.manifest.origins

    @property
    def systems(self) -> Mapping[str, str]:
        """Task -> system message of all its calibration rows; without tasks that have none."""
        return {task: said for task, said in self.manifest.systems.items() if task in self.tasks}

    def messages(self, task: str, prompt: str, system: str | None = None) -> list[dict[str, str]]:
        """A conversation for `tokenizer.apply_chat_template`, as the task's calibration rows are.

        Args:
            task: one of `tasks`.
            prompt: the user's message.
            system: the system message; None takes the rows' own, which may be empty. Where they
                have none, the chat template may put one of its own.
        """
        system = self.systems.get(task) if system is None else system
        before = [] if system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": prompt}]

    @property
    def info(self) -> PackInfo:
        """The facts of the pack's manifest, to write the pack again with some of it changed."""
        found = self.manifest
        info = PackInfo(
            model=found.base.model,
            config_hash=found.base.config_sha256,
            weights_hash=found.base.weights_sha256,
            budget=found.budget.text,
            max_bytes=found.budget.nbytes,
            origins=found.origins,
            systems=self.systems,
            merged={key: self._merged(key, tasks) for key, tasks in self.adapters.items()},
        )
        if isinstance(found, PlainManifest):
            return info
        info = replace(info, n_layers=found.base.n_layers, dtype=getattr(mx, found.dtype))
        return replace(info, gguf=found.gguf) if isinstance(found, GgufManifest) else info

    def base_directory(self, model: str | None) -> Path:
        """The mlx-lm directory of the very base model that the pack was made for.

        Args:
            model: as for `resolve_model`; None is enough where it is the embedded default.

        Raises:
            ModelError: it is needed and not given, cannot be had, or is another model.
        """
        base = self.manifest.base
        return resolve_exact_base(base.model, base.config_sha256, base.weights_sha256, model)

    def check_weights(self, directory: Path) -> None:
        """Refuse a model with the base's config and other weights; raises ModelError."""
        check_weights(
            directory, self.manifest.base.config_sha256, self.manifest.base.weights_sha256
        )

    def adapter_path(self, task: str) -> Path:
        """Directory to give to `mlx_lm.load(..., adapter_path=...)`.

        Raises:
            PackError: the pack does not serve this task, or is compact.
        """
        adapter = self._served_by(task)
        if self.storage != "plain":
            raise PackError(
                f"{self.path}: a {self.storage} pack has no adapter directories; write them with"
                f" d2c-mlx export {self.path} --to mlx --output DIR"
            )
        return self.path / str(adapter)

    def load(self, task: str) -> Adapter | None:
        """The adapter that serves `task`, in 16 bit whatever the storage; None is the base model.

        Raises:
            PackError: the pack does not serve this task, or its file cannot be read.
        """
        stored = self.stored(task)
        if isinstance(stored, Compressed):
            return stored.adapter(self.info.dtype)
        return stored

    def stored(self, task: str) -> Adapter | Compressed | None:
        """The adapter that serves `task` as the pack holds it; arguments and errors of `load`."""
        adapter = self._served_by(task)
        if adapter is None:
            return None
        if self.storage == "compact":
            with self.reading([COMPACT]):
                found = read_compact(self.path / COMPACT, int(adapter))
            return found if found.modules else None
        if isinstance(self.manifest, GgufManifest):
            places = self.manifest.gguf
            with self.reading([str(adapter)]):
                plain = read_gguf(self.path / str(adapter), places.paths(), places.model_dump())
            return replace(plain.uniform(self.info.dtype), base=self.manifest.base.model)
        with self.reading(self.files_of(str(adapter))):
            return load_adapter(self.adapter_path(task))

    @contextmanager
    def reading(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Read files inside the block: none of our commands replaces the pack meanwhile.

        Args:
            names: the files that are read; None is all of them with the manifest.

        Raises:
            PackError: the files are not those that were verified.
        """
        with held(self.path, shared=True):
            yield
            for name in (MANIFEST, *self.manifest.files) if names is None else names:
                path, entry = self.path / name, self.manifest.files.get(name)
                same = _state(path) == self.states.get(name)
                # A pack that is changed keeps most files.
                if not same and not (entry and path.is_file() and hash_file(path) == entry.sha256):
                    raise self._changed()

    def copy(self, name: str, target: Path) -> None:
        """Copy one file of the pack to a new name; raises PackError if it is not what was verified.

        The bytes that are hashed are those that are written.
        """
        entry = self.manifest.files.get(name)
        try:
            digest = copy_file(self.path / name, target)
        except FileNotFoundError:
            raise self._changed() from None
        if entry and entry.sha256 != digest:
            raise self._changed()

    def _changed(self) -> PackError:
        return PackError(
            f"{self.path}: was replaced or changed while it was read; give this command again"
        )

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
        from d2c_mlx.models.stock import switch

        switch(model, None if task is None else self.load(task), self.path)

    def _served_by(self, task: str) -> str | int | None:
        if task not in self.tasks:
            raise PackError(f"{self.path}: no task {task!r}; it serves {', '.join(self.tasks)}")
        return self.tasks[task]


def pack_directory(directory: str | Path) -> Path:
    """The directory itself or, of a run, the pack in it."""
    path = Path(os.path.expanduser(directory))
    inner = path / "pack"
    there = any((one / MANIFEST).is_file() for one in (inner, old_dir(inner)))
    in_a_run = there and not (path / MANIFEST).exists()
    return inner if in_a_run else path


def load_pack(directory: str | Path) -> Pack:
    """Open a pack: verify its manifest, its files and, in a plain pack, the adapters' layout.

    The directory of a run stands for the pack in it.

    Raises:
        PackError: no pack, another version, a manifest that is incomplete or false, files that are
            missing or differ, or adapters that stock mlx-lm or mlx-swift would not load.
    """
    directory = pack_directory(directory)
    _restore(directory)
    with held(directory, shared=True):
        # Before anything is read, so that whatever changes a file from then on shows.
        before = {path: _state(path) for path in directory.glob("*")}
        before |= {path: _state(path) for path in directory.glob("*/*")}
        manifest = read_manifest(directory / MANIFEST)
        names = (MANIFEST, *manifest.files)
        pack = Pack(directory, manifest, {name: before.get(directory / name) for name in names})
        if problems := problems_inside(directory, manifest):
            raise PackError(problems)
        with pack.reading():
            return pack


def _state(path: Path) -> tuple[int, ...] | None:
    """The `file_state` of a file that is there."""
    try:
        return file_state(path)
    except OSError:
        return None


def _restore(directory: Path) -> None:
    """Put a pack back that a killed command had moved aside; raises PackError where that fails."""
    try:
        restore_dir(directory)
    except OSError as error:
        old = old_dir(Path(os.path.realpath(directory)))
        raise PackError(
            f"{directory}: missing; a command that was killed left it as {old}, which cannot be"
            f" moved back ({error.strerror}); rename it"
        ) from None
