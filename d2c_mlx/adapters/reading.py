"""Finding and reading adapters: folders of them, single directories, GGUF files, Hugging Face ids.

`read_adapter` is the one place where formats part. A format has a file name in `weights_file` and a
function that makes an `Adapter` of that file, in a module of its own: PEFT, MLX and GGUF.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter
from d2c_mlx.adapters.checks import DoraBase, base_key, check_adapter, check_base
from d2c_mlx.adapters.gguf_format import read_gguf
from d2c_mlx.adapters.mlx_format import read_mlx
from d2c_mlx.adapters.peft_format import read_peft
from d2c_mlx.adapters.tensor_file import PEFT_WEIGHTS, left_in_file
from d2c_mlx.utils.errors import AdapterError, gather, warn
from d2c_mlx.utils.hub import HubId, download, download_all, list_files, parse_hub_id

# Files at the top of a repository: a pattern without a star matches no checkpoint in a folder.
_FILES = (CONFIG, WEIGHTS, PEFT_WEIGHTS)
_EXPECTED = f"{PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX) or one .gguf of a LoRA"
# Pickles can run code and are never loaded.
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
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
    names, problems = [source.name for group in groups for source in group], []
    first: dict[str, str] = {}
    for name in names:
        # As APFS compares them.
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if not name.isprintable() or name[:1] in ("", ".") or {"/", "\\"} & set(name):
            wrong = f"{ascii(name)} is not printable, is hidden, or is no name of a directory"
        elif (n := len(name.encode(errors="surrogatepass"))) > _MAX_NAME_NBYTES:
            wrong = f"{f'{name[:20]}...'!r} has {n} bytes, expected at most {_MAX_NAME_NBYTES}"
        elif names.count(name) > 1 or other != name:
            wrong = f"{name!r} is that of another adapter, or is one with {other!r} on a Mac"
        else:
            continue
        problems.append(f"{', '.join(entries)}: the name {wrong}; call it NAME=ENTRY")
    if problems:
        raise AdapterError(dict.fromkeys(problems))
    return sorted((x for group in groups for x in group), key=lambda source: source.name)


def local_entries(spec: str | Path | Sequence[str]) -> list[Path] | None:
    """The paths that an option names, as `find_adapters` takes them; None if one is on the hub.

    Use it to tell whether adapters changed; nothing is opened.
    """
    paths = [_split(entry)[2] for entry in _entries(spec)]
    there = [path for path in paths if path is not None]
    return there if len(there) == len(paths) else None


def absolute_entries(spec: str | Path | Sequence[str]) -> str | list[str]:
    """The entries of an option with absolute paths, for a file that is read from elsewhere."""
    absolute = []
    for entry in _entries(spec):
        _, rest, path = _split(entry)
        relative = path is not None and not path.is_absolute()
        absolute.append(f"{entry.removesuffix(rest)}{os.path.abspath(rest)}" if relative else entry)
    return absolute[0] if len(absolute) == 1 else absolute


def _entries(spec: str | Path | Sequence[str]) -> list[str]:
    if isinstance(spec, str) and not os.path.exists(spec):
        return [entry.strip() for entry in spec.split(",")]
    return [str(spec)] if isinstance(spec, str | Path) else list(spec)


def _split(entry: str) -> tuple[str | None, str, Path | None]:
    """The name that an entry gives, if any, what it names, and its path if there is one."""
    name, rest = None, entry
    # A loop, not a call for every sign: text that is no adapter may have thousands.
    while not (there := os.path.exists(os.path.expanduser(rest))) and "=" in rest:
        first, _, rest = rest.partition("=")
        name = first if name is None else name
    return name, rest, Path(os.path.expanduser(rest)) if there else None


def _of_entry(entry: str, field: str) -> list[Source]:
    name, rest, path = _split(entry)
    hub = None if path else parse_hub_id(rest)
    if path and path.is_dir():
        # An adapter that PEFT or mlx-lm trained may have checkpoints in subdirectories.
        single = any((path / file).exists() for file in (*_FILES, *_PICKLES))
        sources = [Source(path.resolve().name, path)] if single else _of_folder(path)
    elif path and _is_gguf(path):
        sources = [Source(path.stem, path)]
    elif hub:
        sources = [_of_hub(hub)]
    else:
        raise AdapterError(
            f"{rest or repr(entry)}: no such directory and no Hugging Face id; {field} is an"
            " adapter (directory, .gguf or owner/name[@revision]) or a folder of them, without *"
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
        problems = [f"{directory}: no adapters; expected a subdirectory for each with {_EXPECTED}"]
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
            f" expected {_EXPECTED}, and no {_PICKLES[0]}, a pickle, which is never loaded;"
            " download what you mean, and give its path"
        )
    directory, _ = download(pinned, files, "adapters", AdapterError)
    return Source(name, directory / files[0], origin)


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    config: Mapping[str, Any] | None = None,
    dora: DoraBase | None = None,
) -> Adapter:
    """Read an adapter, its format recognised by its files, and check it against the base.

    `read_adapters` reads all adapters that an option names.

    Args:
        path: the directory of one adapter, or a `.gguf`.
        shapes: module path -> (in, out) of the base model's linear modules. None compares nothing
            with a base, as for files that we wrote; a GGUF then cannot be read.
        config: the base model's config.json. A GGUF needs it, as its rows are ordered by heads; and
            without it a base whose weights mlx-lm changes is not refused.
        dora: makes DoRAs LoRAs; without it they are refused.

    Raises:
        AdapterError: it cannot be read, or not be converted exactly; every reason is listed.
    """
    path = Path(path)
    file = weights_file(path)
    if file.name == WEIGHTS:
        adapter = read_mlx(path, dora)
    else:
        check_base(file, config)
        if file.name == PEFT_WEIGHTS:
            adapter = read_peft(path, dora, shapes or ())
        else:
            adapter = read_gguf(file, shapes or (), config)
            adapter = adapter if file == path else replace(adapter, name=path.name)
    if shapes is not None:
        check_adapter(adapter, shapes, file)
    return adapter


def weights_file(path: Path) -> Path:
    """The weights of an adapter, which is a directory or a `.gguf`: PEFT's, MLX's, or a GGUF.

    Raises:
        AdapterError: there is none that is read, or more than one.
    """
    if _is_gguf(path):
        return path
    files = [path / name for name in (PEFT_WEIGHTS, WEIGHTS) if (path / name).exists()]
    files = files or sorted(path.glob("*.[gG][gG][uU][fF]"))
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise AdapterError(f"{path}: holds {names}; keep one of them")
    if files:
        return files[0]
    if pickles := [path / name for name in _PICKLES if (path / name).exists()]:
        raise AdapterError(
            f"{pickles[0]}: a pickle can run code and is never loaded; save it again with PEFT's"
            " save_pretrained(..., safe_serialization=True)"
        )
    raise AdapterError(f"{path}: no adapter weights; expected {_EXPECTED}")


def read_adapters(
    sources: Sequence[Source],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    dora: DoraBase | None = None,
    expected: Sequence[str] = (),
) -> list[Adapter]:
    """Read every adapter and check it against the base model; one at a time is in memory.

    What is returned is `left_in_file`. Adapters whose configs name different base models, or others
    than are expected, get an `InputWarning`.

    Args:
        sources: what `find_adapters` found.
        shapes: see `read_adapter`, as for the next two.
        config: the base model's config.json.
        dora: makes DoRAs LoRAs.
        expected: names of the base model, as a pack has them.

    Raises:
        InputError: the problems of all adapters, one line each.
    """

    def read(source: Source) -> Adapter:
        adapter = left_in_file(read_adapter(source.path, shapes, config, dora), source.path)
        return replace(adapter, name=source.name, origin=source.origin)

    adapters = gather(partial(read, source) for source in sources)
    # Shapes do not tell a base model from its fine-tunes; two names may be one model.
    groups: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.base:
            groups.setdefault(base_key(adapter.base), []).append(adapter)
    others = groups.keys() - set(map(base_key, expected))
    if len(others) > (not expected):
        names = []
        for group in groups.values():
            members = [adapter.name for adapter in group[:20]] + ["..."] * (len(group) > 20)
            names.append(f"{group[0].base!r} ({', '.join(members)})")
        usual = " or ".join(map(repr, expected)) or "one"
        warn(f"adapters: found base models {', '.join(names)}, expected {usual}; unless all are the"
             " same model, leave out what was trained on another")  # fmt: skip
    return adapters
