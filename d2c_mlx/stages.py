"""What a stage of a run left behind: enough to know whether it must run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from d2c_mlx import __version__
from d2c_mlx.files import fingerprint, hash_tree, write_json

__all__ = ["Record"]


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
