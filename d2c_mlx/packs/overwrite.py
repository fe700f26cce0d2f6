"""May this directory be replaced as a whole? Only if it holds no input, and only our files.

Each output directory has a marker, `.d2c-mlx.json`, with the kind of the command that wrote it and
every file that it wrote; a command deletes nothing else. Its name is hidden, so listings of
adapters and hashes of directories skip it, and no program that reads adapters looks at it. A pack
has its manifest instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import hash_file, write_json
from d2c_mlx.utils.parsing import json_or_none

if TYPE_CHECKING:
    from d2c_mlx.adapters.sources import Source

__all__ = [
    "MARKER",
    "Input",
    "Kind",
    "Marker",
    "adapter_inputs",
    "all_files",
    "check_output",
    "local_model",
    "mark",
    "read_marker",
    "replaced_inputs",
    "within_adapters",
    "write_marker",
]

MARKER = ".d2c-mlx.json"
Kind = Literal["compare", "compose", "convert", "export", "push", "run"]
# An option, and a path that it names.
Input = tuple[str, Path]
_FORMAT = {"format": "d2c-mlx-output", "format_version": 1}


@dataclass(frozen=True)
class Marker:
    """The content of a marker.

    Attributes:
        kind: kind of the command.
        files: path relative to the directory -> hex SHA-256 of its content; None where the
            content changes as a run goes on.
    """

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
    """Write a marker that lists `files`, see `Marker`; the version is for people."""
    content = {**_FORMAT, "version": VERSION, "kind": kind, "files": dict(files)}
    write_json(directory / MARKER, content)


def read_marker(directory: Path) -> Marker | None:
    """The marker of a directory; None if there is none, or d2c-mlx did not write it."""
    path = directory / MARKER
    # Reading a named pipe would wait for a writer.
    content = json_or_none(path) if path.is_file() else None
    if not isinstance(content, dict) or not _FORMAT.items() <= content.items():
        return None
    kind: Any = content.get("kind")
    files = content.get("files")
    other = content.keys() - {*_FORMAT, "version", "kind", "files"}
    if other or kind not in get_args(Kind) or not isinstance(files, dict):
        return None
    good = all(digest is None or isinstance(digest, str) for digest in files.values())
    return Marker(kind, files) if good else None


def local_model(spec: str | None) -> list[Input]:
    """The base model as an input, if `--model` names a directory or a file."""
    path = Path(os.path.expanduser(spec or ""))
    return [("model", path)] if spec and path.exists() else []


def adapter_inputs(sources: Sequence[Source]) -> list[Input]:
    """Adapters as inputs. Folders come first: one of them says more than the adapters in it."""
    folders = dict.fromkeys(source.folder for source in sources if source.folder)
    return [("adapters", path) for path in (*folders, *(source.path for source in sources))]


def check_output(
    output: Path,
    inputs: Sequence[Input],
    sources: Sequence[Source] = (),
    error: type[InputError] = ConfigError,
) -> None:
    """Refuse an output directory that must not be replaced as a whole.

    Call it before anything is written there. A directory may be replaced if it is empty or holds
    only files that its marker lists, unchanged: those of `compose`, `export` and `push`, and for
    `convert` also those of an earlier `convert` of adapters of the same names.

    Args:
        output: the directory, which may not exist.
        inputs: what is read while it is written.
        sources: adapters that `convert` reads; none for other commands.
        error: raised for an input that would be replaced.

    Raises:
        InputError: an input is in it; it is a file, the working directory or one around that, or
            holds a file that d2c-mlx did not write.
    """
    replaced = replaced_inputs([*inputs, *adapter_inputs(sources)], [output])
    problems = [line for _, line in replaced] + within_adapters(sources, output)
    if problems:
        raise error(problems)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file, expected a directory or a new name")
    if Path(os.path.realpath(output)) in (here := Path.cwd().resolve(), *here.parents):
        raise ConfigError(
            f"output: {output} is replaced as a whole, and you are in it; name another directory"
        )
    marker, names = read_marker(output), {source.name for source in sources}

    def ours(path: Path) -> bool:
        if marker is None or path == output / MARKER:
            return marker is not None
        replaceable = marker.kind in ("compose", "export", "push") or (
            marker.kind == "convert" and path.relative_to(output).parts[0] in names
        )
        return replaceable and marker.wrote(output, path)

    foreign = next((path for path in all_files(output) if not ours(path)), None)
    if foreign:
        raise ConfigError(
            f"output: {output} is replaced as a whole, and {foreign} in it is of no earlier output"
            " of this kind; name another directory, or empty this one"
        )


def all_files(directory: Path) -> Iterator[Path]:
    """All files below a directory in order: what would be lost with it, unless we wrote them.

    Those that a Mac leaves by itself do not count. A link to a directory counts as a file: it would
    be lost, and nothing behind it.
    """
    for folder, folders, files in os.walk(directory):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(folder) / name
            # One in a folder, the other beside a file on a drive of another system.
            beside = name[:2] == "._" and path.with_name(name[2:]).exists()
            if name != ".DS_Store" and not beside:
                yield path


def replaced_inputs(inputs: Iterable[Input], targets: Iterable[Path]) -> list[tuple[Path, str]]:
    """A target and a line, for every target and option of which a path is in that target."""
    places = {identity: path for path in targets if (identity := _identity(path))}
    inside: dict[tuple[str, Path], Path] = {}
    for option, path in inputs:
        for identity in _around(path) & places.keys():
            inside.setdefault((option, places[identity]), path)
    lines = []
    for (option, target), path in inside.items():
        name = f"your {option}" if path == target else f"the {option} {path}"
        line = f"output: this command writes {target} anew, which would replace {name}"
        lines.append((target, f"{line}; give another --output"))
    return lines


def within_adapters(sources: Sequence[Source], output: Path) -> list[str]:
    """A line for every folder of adapters in which the output would be one more of them."""
    around, real = _around(output), Path(os.path.realpath(output))
    lines = []
    for folder in dict.fromkeys(source.folder for source in sources if source.folder):
        inside = real.parts[len(Path(os.path.realpath(folder)).parts) :]
        # A listing of the folder skips hidden names.
        hidden = bool(inside) and inside[0][0] == "."
        if _identity(folder) in around and not hidden:
            lines.append(
                f"output: {output} is in the adapters' folder {folder}, where the next command"
                " would take it for an adapter; give another --output"
            )
    return lines


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of one directory: links, and capitals on a Mac."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _around(path: Path) -> set[tuple[int, int]]:
    """Identities of a path and of all directories around it; a link is in two places."""
    ways = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    around = {_identity(folder) for way in ways for folder in (way, *way.parents)}
    return {identity for identity in around if identity}
