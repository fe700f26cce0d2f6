"""The pack: what ships. Adapters that stock mlx-lm loads, and a manifest that can be checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.adapter import Adapter, load_adapter
from d2c_mlx.errors import PackError
from d2c_mlx.files import hash_file, write_dir, write_json

__all__ = ["Pack", "load_pack", "write_pack"]

MANIFEST, FORMAT, VERSION = "manifest.json", "d2c-mlx-pack", 1


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
    def tasks(self) -> dict[str, str]:
        """Task -> adapter directory, relative to `path`."""
        return self.manifest["tasks"]

    @property
    def nbytes(self) -> int:
        """Bytes of all adapter files."""
        return self.manifest["nbytes"]

    def adapter_path(self, task: str) -> Path:
        """Directory to give to `mlx_lm.load(..., adapter_path=...)`.

        Raises:
            PackError: the pack does not serve this task.
        """
        if task not in self.tasks:
            raise PackError(f"{self.path}: no task {task!r}; it serves {', '.join(self.tasks)}")
        return self.path / self.tasks[task]

    def load(self, task: str) -> Adapter:
        """The adapter that serves `task`."""
        return load_adapter(self.adapter_path(task))


def write_pack(
    directory: Path,
    adapters: Sequence[Adapter],
    *,
    model: str,
    config_hash: str,
    n_layers: int,
    budget: str,
    max_bytes: int | None,
) -> Pack:
    """Write adapters and manifest, then check the files against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: one per cluster, each serving the tasks in its `sources`.
        model: name or hub id of the base model.
        config_hash: hex SHA-256 of the base model's config.json.
        n_layers: number of transformer blocks of the base model.
        budget: as the user wrote it.
        max_bytes: allowed bytes of all adapter files, or None.

    Raises:
        PackError: the files are larger than the budget; nothing is written.
    """
    with write_dir(directory) as temporary:
        tasks: dict[str, str] = {}
        for k, adapter in enumerate(adapters):
            adapter.save(temporary / f"cluster-{k}", n_layers)
            tasks |= {source: f"cluster-{k}" for source in adapter.sources}
        files: dict[str, dict[str, Any]] = {
            file.relative_to(temporary).as_posix(): {
                "nbytes": file.stat().st_size,
                "sha256": hash_file(file),
            }
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        nbytes = sum(entry["nbytes"] for entry in files.values())
        if max_bytes is not None and nbytes > max_bytes:
            raise PackError(f"{directory}: {nbytes:,} bytes, over the budget of {max_bytes:,}")
        manifest = {
            "format": FORMAT,
            "format_version": VERSION,
            "base": {"model": model, "config_sha256": config_hash},
            "budget": {"text": budget, "nbytes": max_bytes},
            "tasks": dict(sorted(tasks.items())),
            "files": files,
            "nbytes": nbytes,
        }
        write_json(temporary / MANIFEST, manifest)
    return load_pack(directory)


def load_pack(directory: Path) -> Pack:
    """Open a pack and verify every file's size and hash.

    Raises:
        PackError: no pack, another version, or files that are missing or differ.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackError(f"{path}: missing; is this a pack?") from None
    except ValueError as error:
        raise PackError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise PackError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    if manifest.get("format") != FORMAT or manifest.get("format_version") != VERSION:
        raise PackError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('format_version')!r},"
            f" expected {FORMAT!r} version {VERSION}"
        )
    files, tasks = manifest.get("files"), manifest.get("tasks")
    if not isinstance(files, dict) or not isinstance(tasks, dict) or "nbytes" not in manifest:
        raise PackError(f"{path}: files, tasks or nbytes is missing; write the pack again")
    problems = [
        f"{path}: task {task!r} points to {folder!r}, whose files the manifest does not list"
        for task, folder in tasks.items()
        if f"{folder}/adapters.safetensors" not in files
    ]
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            problems.append(f"{file}: missing, but the manifest lists it")
        elif file.stat().st_size != entry["nbytes"] or hash_file(file) != entry["sha256"]:
            problems.append(f"{file}: differs from the manifest's size or sha256; copy it again")
    if problems:
        raise PackError(problems)
    return Pack(directory, manifest)
