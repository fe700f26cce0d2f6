"""Whether a manifest is one, and true of the files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.compact_file import read_index
from d2c_mlx.packs.manifest import (
    COMPACT,
    FORMAT,
    MANIFEST,
    VERSIONS,
    CompactManifest,
    GgufManifest,
    GgufPlaces,
    Manifest,
    PlainManifest,
)
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.validation import problems_of

__all__ = ["check_format", "problems_inside", "read_manifest"]

# Characters of a value that a message repeats.
_MOST_FOUND = 60
_MOST_MODULES = 1 << 16


def check_format(path: Path) -> dict[str, Any]:
    """Read a manifest of a format and version that we know; its other fields may be anything.

    Raises:
        PackError: no pack, not JSON, or another format, storage or version.
    """
    try:
        content = parse_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise PackError(f"{path}: missing; is this a pack?") from None
    except OSError as error:
        raise PackError(
            f"{path}: found no file that can be read ({error.strerror}), expected the manifest of a"
            " pack; name the directory of a pack"
        ) from None
    except ValueError as error:
        raise PackError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise PackError(f"{path}: expected a JSON object, found {type(content).__name__}")
    storage = content.get("storage", "plain")
    version = VERSIONS.get(storage) if isinstance(storage, str) else None
    if version is None:
        raise PackError(f"{path}: storage {storage!r}, expected one of {list(VERSIONS)}")
    if content.get("format") != FORMAT or content.get("format_version") != version:
        raise PackError(
            f"{path}: format {content.get('format')!r} version {content.get('format_version')!r},"
            f" expected {FORMAT!r} version {version}"
        )
    return content


_MODELS: dict[object, type[PlainManifest | CompactManifest | GgufManifest]] = {
    "compact": CompactManifest,
    "gguf": GgufManifest,
}


def read_manifest(path: Path) -> PlainManifest | CompactManifest | GgufManifest:
    """Read a manifest, and check it against the files beside it.

    Use it through `load_pack`, which also looks into the files.

    Raises:
        PackError: what `check_format` raises, or every field that is missing or wrong and every
            file that is missing or differs, one line each.
    """
    content = check_format(path)
    model = _MODELS.get(content.get("storage"), PlainManifest)
    # The fields of an object that is missing are told one by one.
    for key in ("base", "budget", "gguf") if model is GgufManifest else ("base", "budget"):
        if not isinstance(content.get(key), dict):
            content[key] = {}
    try:
        manifest, error = model.model_validate(content), None
    except ValidationError as caught:
        manifest, error = None, caught
    problems = [
        *_content_problems(path, content, error),
        *_about_problems(path, model, content, error),
    ]
    if problems or manifest is None:
        raise PackError(problems)
    return manifest


def _content_problems(
    path: Path, content: Mapping[str, Any], error: ValidationError | None
) -> list[str]:
    """Problems of tasks, files and their bytes, which speak of each other."""
    wrong = {details["loc"][:2] for details in error.errors()} if error else set()
    tasks, files = content.get("tasks"), content.get("files")
    problems = []
    sizes: list[int] | None = None
    if not isinstance(tasks, dict) or not tasks:
        found = "none" if tasks == {} else _said(content, "tasks")
        problems.append(f"{path}: tasks: found {found}, expected one or more; write the pack again")
        tasks = {}
    problems += [
        f"{path}: tasks: the name {ascii(name)} has characters that are not printable; rename it"
        for name in tasks
        if not name.isprintable()
    ]
    if not isinstance(files, dict):
        found = _said(content, "files")
        bad = [f"{path}: files: found {found}, expected an object; write the pack again"]
    else:
        ill = [task for task in tasks if ("tasks", task) in wrong]
        check = {"compact": _compact_problems, "gguf": _gguf_problems}.get(
            content.get("storage", "plain"), _plain_problems
        )
        bad = check(path, tasks, files, ill)
        for name, entry in files.items():
            bad += _file_problems(path.parent, name, entry, ("files", name) in wrong)
        # The sum is not known where files differ from what is listed.
        sizes = None if bad else [entry["nbytes"] for entry in files.values()]
    return [*problems, *bad, *_sum_problems(path, content, sizes)]


def _plain_problems(
    path: Path, tasks: Mapping[str, Any], files: Mapping[str, Any], ill: Sequence[str]
) -> list[str]:
    problems = []
    for task, folder in tasks.items():
        missing = [file for file in (WEIGHTS, CONFIG) if f"{folder}/{file}" not in files]
        # "../x" would lead out of the pack, and an export would write there.
        if task in ill or not _inside(folder, 1):
            problems.append(f"{path}: task {task!r} points to {folder!r}, no directory of a pack")
        elif missing:
            problems.append(
                f"{path}: task {task!r} points to {folder!r}, of whose files the manifest does not"
                f" list {', '.join(missing)}; write the pack again"
            )
    return problems


def _compact_problems(
    path: Path, tasks: Mapping[str, Any], files: Mapping[str, Any], ill: Sequence[str]
) -> list[str]:
    problems = []
    if COMPACT not in files:
        problems.append(f"{path}: {COMPACT} is not among its files; write the pack again")
    return problems + [
        f"{path}: task {task!r} points to {tasks[task]!r}, expected the position of an adapter or"
        " null"
        for task in ill
    ]


def _gguf_problems(
    path: Path, tasks: Mapping[str, Any], files: Mapping[str, Any], ill: Sequence[str]
) -> list[str]:
    return [
        f"{path}: task {task!r} points to {str(tasks[task])[:_MOST_FOUND]!r}, expected a .gguf"
        " among its files or null"
        for task, name in tasks.items()
        if task in ill or (name is not None and (name not in files or name[-5:] != ".gguf"))
    ]


def _inside(name: object, depth: int) -> bool:
    """True if a name is a relative path of at most `depth` parts that stays in the pack."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    parts = name.split("/")
    # The file system raises an error of its own for a longer name.
    short = all(len(part.encode()) <= 255 for part in parts)
    return short and len(parts) <= depth and not {"", ".", ".."} & set(parts)


def _file_problems(directory: Path, name: str, entry: Any, ill: bool) -> list[str]:  # noqa: ANN401
    file = directory / name
    if not _inside(name, 2) or not isinstance(entry, dict):
        return [f"{directory / MANIFEST}: files: {ascii(name)} is no file of a pack"]
    if not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
        return [f"{file}: missing, but the manifest lists it"]
    same = not ill and file.stat().st_size == entry["nbytes"]
    if not same or hash_file(file) != entry["sha256"]:
        return [f"{file}: differs from the manifest's size or sha256; copy it again"]
    return []


def _sum_problems(path: Path, content: Mapping[str, Any], sizes: Sequence[int] | None) -> list[str]:
    """Problems of `nbytes`; `sizes` is None where those of the files are not known."""
    nbytes = content.get("nbytes")
    if type(nbytes) is int and (sizes is None or nbytes == sum(sizes)):
        return []
    expected = "a number of bytes" if sizes is None else f"{sum(sizes)}, the bytes of its files"
    found = _said(content, "nbytes")
    return [f"{path}: nbytes: found {found}, expected {expected}; write the pack again"]


def _about_problems(
    path: Path, model: type[Manifest], content: Mapping[str, Any], error: ValidationError | None
) -> list[str]:
    """Problems of base, budget and dtype, one line for each of the three."""
    parts: dict[str, list[str]] = {"base": [], "budget": [], "gguf": []}
    dtype = []
    for problem in problems_of(error, model, content) if error else ():
        place, _, key = problem.field.partition(".")
        if place in parts:
            found = _said(content[place], key)
            more = f", expected {problem.expected}" if problem.found else ""
            parts[place].append(f"{problem.field} is {found}{more}")
        elif place == "dtype":
            found = _said(content, place)
            dtype.append(f"{path}: dtype {found}, expected {problem.expected}")
    lines = [f"{path}: {'; '.join(some)}; write the pack again" for some in parts.values() if some]
    return lines + dtype


def problems_inside(
    directory: Path, manifest: PlainManifest | CompactManifest | GgufManifest
) -> list[str]:
    """Problems of what is in the files, or said of it: layout, index or places of the adapters."""
    if isinstance(manifest, CompactManifest):
        return _index_problems(directory, manifest)
    if isinstance(manifest, GgufManifest):
        return _places_problems(directory, manifest.gguf)
    folders = sorted(set(manifest.tasks.values()))
    return [line for folder in folders for line in layout_problems(directory / folder)]


def _places_problems(directory: Path, places: GgufPlaces) -> list[str]:
    """A problem if the manifest lists more modules than any model has."""
    if places.num_hidden_layers * max(1, len(places.modules)) <= _MOST_MODULES:
        return []
    return [
        f"{directory / MANIFEST}: gguf: {places.num_hidden_layers} blocks of"
        f" {len(places.modules)} modules, at most {_MOST_MODULES:,} in all are read; write the pack"
        " again"
    ]


def _index_problems(directory: Path, manifest: CompactManifest) -> list[str]:
    """Problems of the file's index, and what the manifest says of adapters that it lacks."""
    path = directory / COMPACT
    index = read_index(path)
    names = index.names
    problems = [
        f"{path}: the name {ascii(name)} of adapter {k} is no printable text; write the pack again"
        for k, name in enumerate(names)
        if not isinstance(name, str) or not name.isprintable()
    ]
    outside = [module for module, *_ in index.modules if ".layers." not in module]
    if outside:
        problems.append(
            f"{path}: {len(outside)} modules are in no transformer block (first:"
            f" {ascii(outside[0])}); write the pack again"
        )
    wrong = [k for k in manifest.tasks.values() if k is not None and k not in range(len(names))]
    if wrong:
        problems.append(
            f"{directory / MANIFEST}: tasks name adapter {wrong[0]}, the file holds {len(names)}"
        )
    return problems


def _said(place: Mapping[str, Any], key: str) -> str:
    """How a message repeats a value that may be anything."""
    return repr(place[key])[:_MOST_FOUND] if key in place else "missing"
