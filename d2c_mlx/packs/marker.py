"""The file that marks a directory as written by d2c-mlx, and lists the files written there.

A command that replaces a directory deletes everything in it. It may do so only where an earlier
command wrote everything. So each output directory holds `.d2c-mlx.json`, with the command's kind
and every file that it wrote. The name is hidden, so listings of adapters and hashes of directories
skip it, and no program that reads adapters looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import InputError, PackError
from d2c_mlx.utils.files import hash_file, write_json
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.validation import Checked

__all__ = ["MARKER", "Kind", "Marker", "mark", "read_marker", "write_marker"]

MARKER = ".d2c-mlx.json"
Kind = Literal["compare", "convert", "export", "push", "run"]


class Marker(Checked):
    """The content of a marker.

    Attributes:
        version: version of d2c-mlx, for people who read the file.
        kind: kind of the command; `unpack` has `export`, too.
        files: path relative to the directory -> hex SHA-256 of its content; null where the
            content changes as a run goes on.
    """

    error: ClassVar[type[InputError]] = PackError

    format: Literal["d2c-mlx-output"] = "d2c-mlx-output"
    format_version: Literal[1] = 1
    version: str = VERSION
    kind: Kind
    files: Mapping[str, str | None]

    def wrote(self, directory: Path, path: Path) -> bool:
        """True if a file below the marked directory is listed and holds what was written."""
        digest = self.files.get(path.relative_to(directory).as_posix())
        return digest is not None and path.is_file() and hash_file(path) == digest


def mark(directory: Path, kind: Kind) -> None:
    """Mark a directory whose files are complete.

    Call it last inside `write_dir`, so that a directory is never without its marker.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    write_marker(
        directory, kind, {path.relative_to(directory).as_posix(): hash_file(path) for path in files}
    )


def write_marker(directory: Path, kind: Kind, files: Mapping[str, str | None]) -> None:
    """Write a marker that lists `files`, see `Marker`."""
    write_json(directory / MARKER, Marker(kind=kind, files=files).model_dump())


def read_marker(directory: Path) -> Marker | None:
    """The marker of a directory; None if there is none, or d2c-mlx did not write it."""
    path = directory / MARKER
    # Reading a named pipe would wait for a writer.
    found = json_or_none(path) if path.is_file() else None
    try:
        return Marker.read(found)
    except PackError:
        return None
