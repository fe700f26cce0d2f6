"""What a stage of a run left behind: enough to know whether it must run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2c_mlx import __version__
from d2c_mlx.errors import InputError, PackError
from d2c_mlx.files import fingerprint, hash_tree, write_json
from d2c_mlx.pack import MANIFEST, load_pack

__all__ = ["Record", "check_pack", "expect_pack"]


class Record:
    """`.stages/<name>.json` of a run directory."""

    def __init__(self, output: Path, name: str, options: object, reads: Sequence[str]) -> None:
        """Of one stage and what it is about to work on, see `Workspace.stage`."""
        self._output = output
        self._path = output / ".stages" / f"{name}.json"
        read = [hash_tree(output / file) for file in reads]
        self._inputs = fingerprint([__version__, options, read])

    def holds(self) -> bool:
        """Whether the stage ran on the same inputs and its outputs are untouched."""
        if not self._path.exists():
            return False
        old = json.loads(self._path.read_text(encoding="utf-8"))
        return old["inputs"] == self._inputs and all(
            (self._output / file).exists() and hash_tree(self._output / file) == digest
            for file, digest in old["outputs"].items()
        )

    def write(self, writes: Sequence[str], measured: dict[str, object]) -> None:
        """Remember the artifacts `writes` as they are now, and what the stage measured."""
        outputs = {file: hash_tree(self._output / file) for file in writes}
        write_json(self._path, {"inputs": self._inputs, "outputs": outputs, **measured})


def check_pack(output: Path) -> None:
    """Look whether `pack/` may be replaced: it is missing, damaged, or the one that the run made.

    Raises:
        PackError: it is a sound pack of another making, which would be lost.
    """
    path, record = output / "pack", _pack_record(output)
    made = record["outputs"].get("pack"), record.get("expected")
    if hash_tree(path) in made:
        return
    try:
        manifest = load_pack(path).manifest
    except InputError:
        return
    # What lies beside the files of the pack, such as a Mac's .DS_Store, is no other pack.
    if hash_tree(path, only=[*manifest["files"], MANIFEST]) not in made:
        raise PackError(
            f"{path}: is not the pack that this run made, as after d2c-mlx add, remove or route,"
            " and would be made anew; move it elsewhere or delete it, then run again"
        )


def expect_pack(output: Path, directory: Path) -> None:
    """Record what replaces `pack/` next: a kill may come before the stage is recorded."""
    path = output / ".stages" / "pack.json"
    write_json(path, {**_pack_record(output), "expected": hash_tree(directory)})


def _pack_record(output: Path) -> dict[str, Any]:
    path = output / ".stages" / "pack.json"
    if not path.exists():
        return {"inputs": None, "outputs": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
