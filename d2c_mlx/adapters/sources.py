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
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, PICKLE
from d2c_mlx.utils.errors import AdapterError, gather
from d2c_mlx.utils.hub import HubId, download, download_all, list_files, parse_hub_id

__all__ = [
    "Source",
    "absolute_entries",
    "find_adapters",
    "local_entries",
]

# Files at the top of a repository: a pattern without a star matches no checkpoint in a folder.
_FILES = (CONFIG, WEIGHTS, PEFT_WEIGHTS)
# Suffixes of files that hold weights but not their scale, so no adapter by themselves.
_LOOSE = (".safetensors", ".bin")
# Most bytes of a name: a file has 255 at most, and more is put around it while it is written.
_MAX_NAME_NBYTES = 240


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
    calls = [partial(_of_entry, entry, field) for entry in entries]
    n_remote = sum(local_entries([entry]) is None for entry in entries)
    groups = (download_all if n_remote > 1 else gather)(calls)
    sources = [source for group in groups for source in group]
    problems = _name_problems([source.name for source in sources], ", ".join(entries))
    if problems:
        raise AdapterError(problems)
    return sorted(sources, key=lambda source: source.name)


def local_entries(spec: str | Path | Sequence[str]) -> list[Path] | None:
    """The paths that an option names, as `find_adapters` takes them; None if one is on the hub.

    Use it to tell whether adapters changed; nothing is opened.
    """
    paths = [_split(entry)[2] for entry in _entries(spec)]
    there = [path for path in paths if path is not None]
    return there if len(there) == len(paths) else None


def absolute_entries(spec: str | Path | Sequence[str]) -> str | tuple[str, ...]:
    """The entries of an option with absolute paths, for a file that is read from elsewhere."""
    entries, absolute = _entries(spec), []
    for entry in entries:
        _, rest, path = _split(entry)
        relative = path is not None and not path.is_absolute()
        absolute.append(f"{entry.removesuffix(rest)}{os.path.abspath(rest)}" if relative else entry)
    if absolute == entries and not isinstance(spec, Path):
        return spec if isinstance(spec, str) else tuple(spec)
    return absolute[0] if len(absolute) == 1 else tuple(absolute)


def _entries(spec: str | Path | Sequence[str]) -> list[str]:
    if isinstance(spec, str) and not _exists(Path(spec)):
        return [entry.strip() for entry in spec.split(",")]
    return [str(spec)] if isinstance(spec, str | Path) else list(spec)


def _split(entry: str) -> tuple[str | None, str, Path | None]:
    """The name that an entry gives, if any, what it names, and its path if there is one."""
    name, rest = None, entry
    # A loop, not a call for every sign: text that is no adapter may have thousands.
    while not (there := bool(rest) and _exists(Path(os.path.expanduser(rest)))) and "=" in rest:
        first, _, rest = rest.partition("=")
        name = first if name is None else name
    return name, rest, Path(os.path.expanduser(rest)) if there else None


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


def _of_entry(entry: str, field: str) -> list[Source]:
    if not entry:
        raise AdapterError("adapters: an entry is empty; give folders, adapters or ids")
    name, rest, path = _split(entry)
    hub = None if path else parse_hub_id(rest)
    if path and path.is_dir():
        # An adapter that PEFT or mlx-lm trained may have checkpoints in subdirectories.
        single = any((path / file).exists() for file in (*_FILES, PICKLE))
        sources = [Source(path.resolve().name, path)] if single else _of_folder(path)
    elif path and _is_gguf(path):
        sources = [Source(path.stem, path)]
    elif hub:
        sources = [_of_hub(hub)]
    else:
        raise AdapterError(
            f"{rest or entry}: no such directory and no Hugging Face id; {field} is an adapter (its"
            " directory, a .gguf file or owner/name[@revision]) or a folder of them, without *"
        )
    if name is None:
        return sources
    if len(sources) > 1:
        raise AdapterError(f"adapters: {entry!r} names {len(sources)} adapters, expected one")
    return [replace(source, name=name) for source in sources]


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _of_folder(directory: Path) -> list[Source]:
    inside = [path for path in sorted(directory.iterdir()) if path.name[0] != "."]
    # Passed over, they would be missing from the merge and its budget without a word.
    problems = [
        f"{path}: a link to nothing, or weights beside the adapters, expected in a folder of their"
        f" own; move it into {directory.name}/<name> with its {CONFIG}, or out of here"
        for path in inside
        if not path.exists() or (path.suffix.lower() in _LOOSE and path.is_file())
    ]
    sources = [Source(path.name, path, folder=directory) for path in inside if path.is_dir()]
    sources += [Source(path.stem, path, folder=directory) for path in inside if _is_gguf(path)]
    if not sources and not problems:
        problems = [
            f"{directory}: no adapters; expected one subdirectory per adapter with"
            f" {PEFT_WEIGHTS} (PEFT) or {WEIGHTS} (MLX), or .gguf files"
        ]
    if problems:
        raise AdapterError(problems)
    return sources


def _of_hub(hub: HubId) -> Source:
    """Download the adapter of one repository, and nothing else of it."""
    directory, commit = download(hub, _FILES, "adapters", AdapterError)
    name, origin = hub.repo.rpartition("/")[2], f"{hub.repo}@{commit}"
    if any((directory / file).exists() for file in (WEIGHTS, PEFT_WEIGHTS)):
        return Source(name, directory, origin)
    pinned = HubId(hub.repo, commit)
    files = [path.name for path in directory.glob("*.gguf")]
    if len(files) != 1:
        listed = list_files(pinned, "adapters", AdapterError)
        files = [file for file in listed if file.endswith(".gguf") and "/" not in file]
    if len(files) != 1:
        raise AdapterError(
            f"adapters: {str(pinned)!r} has no adapter at its top, but {len(files)} .gguf files;"
            f" expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX) or one .gguf of a LoRA, and no"
            f" {PICKLE}, a pickle, which is never loaded: download what you mean, and give its path"
        )
    directory, _ = download(pinned, files, "adapters", AdapterError)
    return Source(name, directory / files[0], origin)


def _name_problems(names: Sequence[str], where: str) -> list[str]:
    """Describe names that occur twice, or that other systems could not hold."""
    problems = []
    first: dict[str, str] = {}
    for name in names:
        nbytes = len(name.encode(errors="surrogatepass"))
        # As APFS compares them.
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if not name.isprintable() or not name.strip(".") or {"/", "\\"} & set(name):
            wrong = f"{ascii(name)} is not printable, or is no name of a directory"
        elif name[0] == ".":
            wrong = f"{name!r} begins with a dot, and hidden files are passed over"
        elif nbytes > _MAX_NAME_NBYTES:
            wrong = f"{f'{name[:20]}...'!r} has {nbytes} bytes, expected at most {_MAX_NAME_NBYTES}"
        elif names.count(name) > 1 or other != name:
            wrong = f"{name!r} is that of another adapter, or is one with {other!r} on a Mac"
        else:
            continue
        problems.append(f"{where}: the name {wrong}; call it NAME=ENTRY")
    return list(dict.fromkeys(problems))
