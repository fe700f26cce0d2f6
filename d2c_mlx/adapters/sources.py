"""Finding adapters: folders of them, single directories, GGUF files, Hugging Face ids."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.adapters.gguf_format import is_gguf_lora
from d2c_mlx.adapters.mlx_format import ADAPTER_BIAS
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, PICKLE
from d2c_mlx.utils.errors import AdapterError, gather
from d2c_mlx.utils.hub import HubId, download, download_all, list_files, parse_hub_id, read_head

__all__ = ["Source", "absolute_entries", "find_adapters", "local_entries"]

# Files at the top of a repository: a pattern without a star matches no checkpoint in a folder.
_FILES = (CONFIG, WEIGHTS, PEFT_WEIGHTS)
# Suffixes of files that hold weights but not their scale, so no adapter by themselves.
_LOOSE = (".safetensors", ".bin")
# Most bytes of a name: a file has 255 at most, and more is put around it while it is written.
_MAX_NAME_NBYTES = 240
# Bytes at the head of a GGUF that hold its general.type; converters write it among the first.
_HEAD_NBYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """One adapter that was found and is not read yet.

    Attributes:
        name: the name of the adapter, and of the task that it serves.
        path: its directory, or its `.gguf`.
        origin: `owner/name@commit` if it came from the hub, whatever revision was asked for.
        folder: the folder of adapters that it was found in; None if it was named itself.
    """

    name: str
    path: Path
    origin: str | None = None
    folder: Path | None = None


def find_adapters(spec: str | Path | Sequence[str], field: str = "--adapters") -> list[Source]:
    """Find every adapter that an option names, sorted by name; nothing is read but hub downloads.

    `read_adapters` reads them.

    Args:
        spec: one entry, or several as a sequence or separated by commas. An entry is one of

            - a folder with one subdirectory or `.gguf` per adapter (hidden ones are passed over;
              links to nothing and other files of weights are refused),
            - the directory of one adapter, or a `.gguf`,
            - a Hugging Face id of one adapter, `owner/name[@revision]`, if there is no such path:
              the only case that uses the network,
            - `NAME=ENTRY`, to give an adapter another name than that of its directory, file or
              repository.

            Names become directories: they have at most 240 bytes, are not hidden, and no two of
            them are one name on a Mac.
        field: the option, for messages.

    Raises:
        InputError: the problems of all entries, one line each.
    """
    entries = _entries(spec)
    calls = [partial(_entry, entry, field) for entry in entries]
    several = sum(local_entries([entry]) is None for entry in entries) > 1
    found = [one for some in (download_all if several else gather)(calls) for one in some]
    problems = _name_problems([one.name for one in found], ", ".join(entries))
    if problems:
        raise AdapterError(problems)
    return sorted(found, key=lambda one: one.name)


def local_entries(spec: str | Path | Sequence[str]) -> list[Path] | None:
    """The paths that an option names, as `find_adapters` takes them; None if one is on the hub.

    Use it to tell whether adapters changed; nothing is opened.
    """
    found = []
    for entry in _entries(spec):
        rest = entry
        while not _exists(path := Path(os.path.expanduser(rest))) and "=" in rest:
            rest = rest.partition("=")[2]
        if not rest or not _exists(path):
            return None
        found.append(path)
    return found


def absolute_entries(spec: str | Path | Sequence[str]) -> str | tuple[str, ...]:
    """The entries of an option with absolute paths, for a file that is read from elsewhere."""
    entries = _entries(spec)
    found = []
    for entry in entries:
        rest = entry
        while not _exists(path := Path(os.path.expanduser(rest))) and "=" in rest:
            rest = rest.partition("=")[2]
        relative = rest and _exists(path) and not path.is_absolute()
        found.append(f"{entry.removesuffix(rest)}{os.path.abspath(path)}" if relative else entry)
    if found == entries and not isinstance(spec, Path):
        return spec if isinstance(spec, str) else tuple(spec)
    return found[0] if len(found) == 1 else tuple(found)


def _entries(spec: str | Path | Sequence[str]) -> list[str]:
    if isinstance(spec, str) and not _exists(Path(spec)):
        return [entry.strip() for entry in spec.split(",")]
    return [str(spec)] if isinstance(spec, str | Path) else list(spec)


def _entry(entry: str, field: str) -> list[Source]:
    if not entry:
        raise AdapterError("adapters: an entry is empty; give folders, adapters or ids")
    path = Path(os.path.expanduser(entry))
    there = _exists(path)
    name, _, rest = entry.partition("=")
    if rest and not there:
        # A loop, not a call for every sign: text that is no adapter may have thousands.
        while (more := rest.partition("=")[2]) and not _exists(Path(os.path.expanduser(rest))):
            rest = more
        found = _entry(rest, field)
        if len(found) > 1:
            raise AdapterError(f"adapters: {entry!r} names {len(found)} adapters, expected one")
        return [replace(one, name=name) for one in found]
    if there and path.is_dir():
        # One that PEFT or mlx-lm trained may have checkpoints in subdirectories.
        return [Source(path.resolve().name, path)] if _is_single(path) else _folder(path)
    if there and _is_gguf(path):
        return [Source(path.stem, path)]
    hub = None if there else parse_hub_id(entry)
    if hub is None:
        pattern = "*" in path.name and _exists(path.parent)
        close = f"; give the folder itself, {path.parent}" if pattern else ""
        raise AdapterError(
            f"{entry}: no such directory and no Hugging Face id; {field} is an adapter (its"
            f" directory, a .gguf file or owner/name[@revision]) or a folder of them{close}"
        )
    return [_from_hub(hub)]


def _exists(path: Path) -> bool:
    """True if the path exists; text that is no path at all, such as a long list, does not."""
    try:
        return path.exists()
    except ValueError:
        return False
    except OSError as error:
        # Whatever else is wrong, such as a folder that may not be read, is for the user to know.
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _is_single(directory: Path) -> bool:
    """True if a directory is one adapter's; subdirectories may be its checkpoints."""
    return any((directory / file).exists() for file in (*_FILES, ADAPTER_BIAS, PICKLE))


def _folder(directory: Path) -> list[Source]:
    inside = [path for path in sorted(directory.iterdir()) if path.name[0] != "."]
    # Passed over, they would be missing from the merge and its budget without a word.
    problems = [
        f"{path}: a link to {path.readlink()}, which is not there; mend the link or remove it"
        for path in inside
        if not path.exists()
    ]
    problems += [
        f"{path}: weights beside the adapters, expected in a folder of their own; move them into"
        f" {directory.name}/<name> with their {CONFIG}, or out of here"
        for path in inside
        if path.suffix.lower() in _LOOSE and path.is_file()
    ]
    if problems:
        raise AdapterError(problems)
    found = [Source(path.name, path, folder=directory) for path in inside if path.is_dir()]
    found += [Source(path.stem, path, folder=directory) for path in inside if _is_gguf(path)]
    if not any(one.path.is_file() or _has_adapter(one.path) for one in found):
        for one in found:
            n = sum(map(_has_adapter, one.path.iterdir()))
            if n:
                raise AdapterError(
                    f"{directory}: no adapters, but {one.path} has {n}; give that folder"
                )
    if not found:
        raise AdapterError(
            f"{directory}: no adapters; expected one subdirectory per adapter with"
            f" {PEFT_WEIGHTS} (PEFT) or {WEIGHTS} (MLX), or .gguf files"
        )
    return found


def _has_adapter(path: Path) -> bool:
    return path.is_dir() and (_is_single(path) or any(map(_is_gguf, path.iterdir())))


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _name_problems(names: Sequence[str], where: str) -> list[str]:
    """Describe names that occur twice, or that other systems could not hold."""
    problems = [f"{where}: the name {wrong}" for name in names if (wrong := _wrong(name))]
    known: dict[str, str] = {}
    for name in names:
        # As APFS compares them.
        folded = unicodedata.normalize("NFC", name).casefold()
        other = known.setdefault(folded, "")
        if other == name:
            problems.append(f"{where}: {name!r} is the name of several; call one NAME=ENTRY")
        elif other:
            problems.append(
                f"{where}: {other!r} and {name!r} are one name on a Mac; rename one of them"
            )
        known[folded] = name
    return problems


def _wrong(name: str) -> str | None:
    """Describe what is wrong with a name by itself; None if nothing is."""
    if not name.isprintable() or not name.strip(".") or {"/", "\\"} & set(name):
        return (
            f"{ascii(name)} has characters that are not printable or is no name of a directory;"
            " rename the adapter"
        )
    if name[0] == ".":
        return f"{name!r} begins with a dot, and what is hidden is passed over; call it NAME=ENTRY"
    nbytes = len(name.encode())
    if nbytes > _MAX_NAME_NBYTES:
        shown = f"{name[:20]}..."
        return (
            f"{shown!r} has {nbytes} bytes, expected at most {_MAX_NAME_NBYTES}; call it NAME=ENTRY"
        )
    return None


def _from_hub(one: HubId) -> Source:
    """Download the adapter of one repository, and nothing else of it."""
    directory, commit = download(one, _FILES, "adapters", AdapterError)
    name, origin = one.repo.rpartition("/")[2], f"{one.repo}@{commit}"
    if any((directory / file).exists() for file in (WEIGHTS, PEFT_WEIGHTS)):
        return Source(name, directory, origin)
    pinned = HubId(one.repo, commit)
    # Other programs keep base models in the same cache.
    kept = [file for file in sorted(directory.glob("*")) if _is_gguf(file) and _is_lora(file)]
    if len(kept) == 1:
        return Source(name, kept[0], origin)
    file_name = _the_gguf(pinned)
    directory, _ = download(pinned, [file_name], "adapters", AdapterError)
    return Source(name, directory / file_name, origin)


def _is_lora(path: Path) -> bool:
    with open(path, "rb") as file:
        return is_gguf_lora(file.read(_HEAD_NBYTES))


def _the_gguf(one: HubId) -> str:
    """The name of a repository's GGUF LoRA; a base model is seen by its first bytes.

    Raises:
        AdapterError: there is none, or more than one.
    """
    files = list_files(one, "adapters", AdapterError)
    found = [
        file
        for file in sorted(files)
        if file.lower().endswith(".gguf")
        and "/" not in file
        and is_gguf_lora(read_head(one, file, _HEAD_NBYTES, "adapters", AdapterError))
    ]
    if len(found) == 1:
        return found[0]
    if PICKLE in files:
        raise AdapterError(
            f"adapters: {str(one)!r} has only {PICKLE}: a pickle can run code and is never loaded;"
            " ask its author for safetensors"
        )
    what = f"several GGUF adapters ({', '.join(found)})" if found else "no adapter at its top"
    raise AdapterError(
        f"adapters: {str(one)!r} has {what}; expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX) or one"
        " GGUF LoRA: download what you mean, and give its path"
    )
