"""The pack, which is what ships: adapters, and a manifest that can be checked.

Plain packs hold directories that stock mlx-lm loads; compact ones hold all adapters at a few bits
in one file, and `export` writes plain directories of either (docs/concepts/pack-file.md).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import read_config
from d2c_mlx.adapters.gguf_format import read_gguf
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import COMPACT, read_compact, read_index
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.models.resolve import resolve_base
from d2c_mlx.packs.manifest import MANIFEST, Manifest, check_files, read_manifest
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import copy_file, file_state, hash_file, held, old_dir, restore_dir


@dataclass(frozen=True)
class Pack:
    """A verified pack on disk; `load_pack` makes one.

    Attributes:
        path: its directory.
        manifest: what its `manifest.json` says.
        states: file -> its `file_state` when it was verified.
    """

    path: Path
    manifest: Manifest
    states: Mapping[str, tuple[int, ...]]

    @property
    def storage(self) -> str:
        """`plain`, `compact` or `gguf`."""
        return self.manifest.storage

    @property
    def tasks(self) -> Mapping[str, str | int | None]:
        """Task -> adapter, see `Manifest.tasks`."""
        return self.manifest.tasks

    @property
    def adapters(self) -> dict[str | int, list[str]]:
        """Adapter, as in `tasks` -> the tasks that it serves."""
        served: dict[str | int, list[str]] = {}
        for task, adapter in self.tasks.items():
            if adapter is not None:
                served.setdefault(adapter, []).append(task)
        # cluster-2 before cluster-10.
        return dict(sorted(served.items(), key=lambda item: (len(str(item[0])), str(item[0]))))

    def files_of(self, adapter: str) -> dict[str, int]:
        """Files of an adapter of a pack that is not compact -> their bytes."""
        return {
            name: file.nbytes
            for name, file in self.manifest.files.items()
            if name == adapter or name.startswith(f"{adapter}/")
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all adapter files."""
        return self.manifest.nbytes

    def merged(self, adapter: str | int) -> int:
        """Number of adapters in this one; removed ones stay in their merge and count.

        Args:
            adapter: as in `tasks`.
        """
        return max(self.manifest.merged.get(str(adapter), 0), len(self.adapters[adapter]))

    def messages(self, task: str, prompt: str, system: str | None = None) -> list[dict[str, str]]:
        """A conversation for `tokenizer.apply_chat_template`, as the task's calibration rows are.

        Args:
            task: one of `tasks`.
            prompt: the user's message.
            system: the system message; None takes the rows' own, which may be empty. Where they
                have none, the chat template may put one of its own.
        """
        system = self.manifest.systems.get(task) if system is None else system
        before = [] if system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": prompt}]

    def base_directory(self, model: str | None, exact: bool = True) -> Path:
        """The mlx-lm directory of the very base model that the pack was made for.

        Args:
            model: as for `resolve_model`; None is enough where it is the embedded default.
            exact: False takes one with another config too, such as a quantized one.

        Raises:
            ModelError: it is needed and not given, cannot be had, or is another model.
        """
        base = self.manifest
        return resolve_base(base.model, base.config_hash, base.weights_hash, model, exact)

    def load(self, task: str, dtype: mx.Dtype | None = None) -> Adapter | None:
        """The adapter that serves `task`, in 16 bit whatever the storage; None is the base model.

        Args:
            task: one of `tasks`.
            dtype: of an adapter of a compact pack; None is that of the base's activations.

        Raises:
            PackError: the pack does not serve this task, or its file cannot be read.
        """
        stored = self.stored(task)
        if isinstance(stored, Compressed):
            return stored.adapter(dtype or self.manifest.dtype)
        return stored

    def stored(self, task: str) -> Adapter | Compressed | None:
        """The adapter that serves `task` as the pack holds it; arguments and errors of `load`."""
        if task not in self.tasks:
            what = f"no task {task!r}" if task else "no --task was named"
            raise PackError(f"{self.path}: {what}; it serves {', '.join(self.tasks)}")
        adapter = self.tasks[task]
        if adapter is None:
            return None
        if self.storage == "compact":
            compressed = self.compressed([adapter])[adapter]
            return compressed if compressed.modules else None
        name = str(adapter)
        with self.reading(self.files_of(name)):
            places = self.manifest.gguf
            if self.storage == "plain" or places is None:
                return read_adapter(self.path / name)
            plain = read_gguf(self.path / name, places.paths(), places.model_dump())
            return replace(plain.uniform(self.manifest.dtype), base=self.manifest.model)

    def compressed(self, adapters: Iterable[Any] | None = None) -> dict[Any, Compressed]:
        """Adapters of a compact pack by their positions; None is all that serve a task."""
        keys: Iterable[Any] = self.adapters if adapters is None else adapters
        with self.reading([COMPACT]):
            return {key: read_compact(self.path / COMPACT, key) for key in keys}

    @property
    def n_layers(self) -> int:
        """Blocks of the base model, which adapters in mlx-lm's layout state."""
        if self.storage != "plain":
            return self.manifest.n_layers
        config = read_config(self.path / str(next(iter(self.adapters))))
        return int(str(config["num_layers"]))

    @contextmanager
    def reading(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Read files inside the block: none of our commands replaces the pack meanwhile.

        Args:
            names: the files that are read; None is all.

        Raises:
            PackError: the files are not those that were verified.
        """
        with held(self.path, shared=True):
            yield
            for name in self.manifest.files if names is None else names:
                path, entry = self.path / name, self.manifest.files[name]
                try:
                    # A pack that is changed keeps most files.
                    same = file_state(path) == self.states[name]
                    same = same or hash_file(path) == entry.sha256
                except OSError:
                    same = False
                if not same:
                    raise self._changed()

    def copy_all(self, names: Iterable[str], directory: Path) -> None:
        """Copy files of the pack into a directory that does not have them.

        The bytes that are hashed are those that are written.

        Raises:
            PackError: a file is not what was verified.
        """
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                digest = copy_file(self.path / name, directory / name)
            except FileNotFoundError:
                raise self._changed() from None
            if digest != self.manifest.files[name].sha256:
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


def pack_directory(directory: str | Path) -> Path:
    """The directory itself or, of a run, the pack in it."""
    path = Path(os.path.expanduser(directory))
    inner = path / "pack"
    in_a_run = any((folder / MANIFEST).is_file() for folder in (inner, old_dir(inner)))
    return inner if in_a_run and not (path / MANIFEST).exists() else path


def load_pack(directory: str | Path) -> Pack:
    """Open a pack: verify its manifest, its files and, in a plain pack, the adapters' layout.

    The directory of a run stands for the pack in it.

    Raises:
        PackError: no pack, another version, a manifest that is incomplete or false, files that are
            missing or differ, or adapters that stock mlx-lm or mlx-swift would not load.
    """
    directory = pack_directory(directory)
    # A command that was killed may have left it moved aside.
    restore_dir(directory)
    with held(directory, shared=True):
        manifest = read_manifest(directory / MANIFEST)
        pack = Pack(directory, manifest, check_files(directory, manifest))
        problems = []
        for folder in sorted(map(str, pack.adapters)) if manifest.storage == "plain" else ():
            problems += layout_problems(directory / folder)
        if manifest.storage == "compact":
            index = read_index(directory / COMPACT)
            n = len(index.names)
            wrong: dict[str, list[Any]] = {
                "adapters have names that are no printable text": [
                    name
                    for name in index.names
                    if not isinstance(name, str) or not name.isprintable()
                ],
                "modules are in no transformer block": [
                    module for module, *_ in index.modules if ".layers." not in module
                ],
                f"adapters of tasks are not in the file, which holds {n}": [
                    key for key in pack.adapters if key not in range(n)
                ],
            }
            problems = [
                f"{directory / COMPACT}: {len(values)} {words} (first: {ascii(values[0])}); write"
                " the pack again"
                for words, values in wrong.items()
                if values
            ]
        if problems:
            raise PackError(problems)
        return pack
