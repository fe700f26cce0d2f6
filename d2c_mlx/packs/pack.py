"""The pack: what ships. Adapters, and a manifest that can be checked.

Plain packs hold directories that stock mlx-lm loads; compact ones hold all adapters at a few bits
in one file, and `unpack` makes plain directories of either (docs/packs.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.layout_check import layout_problems
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.compress.compact_file import read_compact, read_index
from d2c_mlx.packs.manifest import (
    COMPACT,
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSIONS,
    manifest_problems,
    read_manifest,
)
from d2c_mlx.utils.errors import PackError

__all__ = ["COMPACT", "FORMAT", "MANIFEST", "VERSIONS", "Pack", "load_pack"]

_DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in DTYPES}


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
        from d2c_mlx.models.attach import switch

        switch(model, None if task is None else self.load(task), self.path)

    def _served_by(self, task: str) -> str | int | None:
        if task not in self.tasks:
            raise PackError(f"{self.path}: no task {task!r}; it serves {', '.join(self.tasks)}")
        return self.tasks[task]


def _read(pack: Pack, adapter: int) -> Adapter | None:
    return read_compact(pack.path / COMPACT, adapter).adapter(_DTYPES[pack.manifest["dtype"]])


def load_pack(directory: Path) -> Pack:
    """Open a pack and verify all that its manifest says, in a plain pack the adapters' layout too.

    Raises:
        PackError: no pack, another version, a manifest that is incomplete or false, files that are
            missing or differ, or adapters that stock mlx-lm or mlx-swift would not load.
    """
    manifest = read_manifest(directory / MANIFEST)
    problems = manifest_problems(directory, manifest)
    pack = Pack(directory, manifest)
    if not problems:
        problems = _compact_problems(pack) if pack.storage == "compact" else _plain_problems(pack)
    if problems:
        raise PackError(problems)
    return pack


def _plain_problems(pack: Pack) -> list[str]:
    """Of the layout of files that are those of the manifest."""
    folders = sorted({str(folder) for folder in pack.tasks.values()})
    return [line for folder in folders for line in layout_problems(pack.path / folder)]


def _compact_problems(pack: Pack) -> list[str]:
    """Between the manifest and the adapters in the file."""
    path = pack.path / COMPACT
    names = read_index(path).names
    problems = [
        f"{path}: the name {ascii(name)} of adapter {k} is no printable text; write the pack again"
        for k, name in enumerate(names)
        if not isinstance(name, str) or not name.isprintable()
    ]
    wrong = [k for k in pack.tasks.values() if k is not None and k not in range(len(names))]
    if wrong:
        problems.append(
            f"{pack.path / MANIFEST}: tasks name adapter {wrong[0]}, the file holds {len(names)}"
        )
    return problems
