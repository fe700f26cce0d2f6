"""The manifest of a pack: what it must say, and whether it is true of the pack's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "COMPACT",
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "VERSIONS",
    "manifest_problems",
    "read_manifest",
]

MANIFEST, FORMAT, COMPACT = "manifest.json", "d2c-mlx-pack", "compact.safetensors"
# Storage -> version of the format. A plain pack is what version 1 always was; its manifests of
# before there was another storage do not name it.
VERSIONS = {"plain": 1, "compact": 2}
# Of the base's activations, as compact packs name them.
DTYPES = ("float16", "bfloat16", "float32")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest of a format and version that we know; what else it says may be anything.

    Raises:
        PackError: no pack, not JSON, or another format, storage or version.
    """
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise PackError(f"{path}: missing; is this a pack?") from None
    except (IsADirectoryError, PermissionError) as error:
        raise PackError(
            f"{path}: found no file that can be read ({error.strerror}), expected the manifest of a"
            " pack; name the directory of a pack"
        ) from None
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
    return manifest


def manifest_problems(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Everything that a manifest lacks, and that is not so of the files; one line each.

    What passes can be served, listed and changed: nothing that these read of it is missing.

    Args:
        directory: of the pack.
        manifest: what `read_manifest` gave.
    """
    path = directory / MANIFEST
    tasks, files = manifest.get("tasks"), manifest.get("files")
    problems = []
    sizes: list[int] | None = None
    if not isinstance(tasks, dict) or not tasks:
        found = "none" if tasks == {} else _said(manifest, "tasks")
        problems.append(f"{path}: tasks: found {found}, expected one or more; write the pack again")
        tasks = {}
    problems += [
        f"{path}: tasks: the name {ascii(name)} has characters that are not printable; rename it"
        for name in tasks
        if not name.isprintable()
    ]
    if not isinstance(files, dict):
        found = _said(manifest, "files")
        false = [f"{path}: files: found {found}, expected an object; write the pack again"]
    else:
        compact = manifest.get("storage", "plain") == "compact"
        false = (_compact_problems if compact else _plain_problems)(path, tasks, files)
        for name, entry in files.items():
            false += _file_problems(directory, name, entry)
        # Files that are not as listed, or not listed, have no sum to compare.
        sizes = None if false else [entry["nbytes"] for entry in files.values()]
    return [*problems, *false, *_sum_problems(path, manifest, sizes), *_about(path, manifest)]


def _plain_problems(path: Path, tasks: Mapping[str, Any], files: Mapping[str, Any]) -> list[str]:
    problems = []
    for task, folder in tasks.items():
        missing = [file for file in (WEIGHTS, CONFIG) if f"{folder}/{file}" not in files]
        # "../x" would lead out of the pack, and `unpack` would write there.
        if not _inside(folder, 1):
            problems.append(f"{path}: task {task!r} points to {folder!r}, no directory of a pack")
        elif missing:
            problems.append(
                f"{path}: task {task!r} points to {folder!r}, of whose files the manifest does not"
                f" list {', '.join(missing)}; write the pack again"
            )
    return problems


def _compact_problems(path: Path, tasks: Mapping[str, Any], files: Mapping[str, Any]) -> list[str]:
    problems = []
    if COMPACT not in files:
        problems.append(f"{path}: {COMPACT} is not among its files; write the pack again")
    return problems + [
        f"{path}: task {task!r} points to {k!r}, expected the position of an adapter or null"
        for task, k in tasks.items()
        if k is not None and type(k) is not int
    ]


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
    nbytes = entry.get("nbytes")
    # 5.0 and, of one byte, true would be equal, but are no sizes.
    same = type(nbytes) is int and file.stat().st_size == nbytes
    if not same or hash_file(file) != entry.get("sha256"):
        return [f"{file}: differs from the manifest's size or sha256; copy it again"]
    return []


def _sum_problems(
    path: Path, manifest: Mapping[str, Any], sizes: Sequence[int] | None
) -> list[str]:
    """Of `nbytes`; `sizes` is None where those of the files are not known."""
    nbytes = manifest.get("nbytes")
    if type(nbytes) is int and (sizes is None or nbytes == sum(sizes)):
        return []
    expected = "a number of bytes" if sizes is None else f"{sum(sizes)}, the bytes of its files"
    found = _said(manifest, "nbytes")
    return [f"{path}: nbytes: found {found}, expected {expected}; write the pack again"]


def _about(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Problems of what is said about base and budget, a line for each of them."""
    text, whole = "a string", "a whole number above 0"
    base = {"model": text, "config_sha256": text}
    compact = manifest.get("storage", "plain") == "compact"
    if compact:
        base["n_layers"] = whole
    # A budget's text is what the caller of `write_pack` said; who changes the pack parses it.
    expected = {"base": base, "budget": {"text": text, "nbytes": f"{whole} or null"}}
    problems = []
    for field, keys in expected.items():
        entry = manifest.get(field)
        entry = entry if isinstance(entry, dict) else {}
        bad = []
        for key, kind in keys.items():
            value = entry.get(key, ...)
            good = type(value) is int and value > 0 if kind != text else isinstance(value, str)
            if not good and not (value is None and "null" in kind):
                more = "" if value is ... else f", expected {kind}"
                bad.append(f"{field}.{key} is {_said(entry, key)}{more}")
        if bad:
            problems.append(f"{path}: {'; '.join(bad)}; write the pack again")
    # It may be anything, a list too.
    if compact and manifest.get("dtype") not in list(DTYPES):
        found = _said(manifest, "dtype")
        problems.append(f"{path}: dtype {found}, expected one of {list(DTYPES)}")
    return problems


def _said(place: Mapping[str, Any], key: str) -> str:
    """How a message speaks of a value that may be anything."""
    return repr(place[key])[:60] if key in place else "missing"
