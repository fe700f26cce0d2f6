"""Which base model a directory holds, by content, and models converted once that stay whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import (
    file_state,
    fingerprint,
    hash_file,
    hash_tree,
    open_file,
    read_text,
    visible_files,
    write_dir,
    write_json,
    write_text,
)
from d2c_mlx.utils.lock import locked
from d2c_mlx.utils.parsing import json_or_none

__all__ = ["cached_model", "config_digest", "file_digest", "weights_digest"]

# A file that changed so lately may change again within one tick of the file system's clock.
_SETTLED_SECONDS = 2
# In a converted model: the hash of its other files, as they were written.
_WRITTEN = ".sha256"
# Errors of reading a header that is none.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def config_digest(directory: Path) -> str:
    """Hex SHA-256 of a model's config.json in canonical form, the same however it is indented.

    Raises:
        ModelError: the file cannot be read.
    """
    path = directory / "config.json"
    try:
        return fingerprint(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None


def weights_digest(directory: Path) -> str:
    """Hex SHA-256 of the names, dtypes, shapes and numbers of a model's tensors.

    Neither the order of tensors nor the files that they are in count: MLX writes another order on
    another system.

    Raises:
        ModelError: a file of weights is none.
    """
    files = sorted(directory.glob("model*.safetensors"))
    return _remembered("weights", files, lambda: fingerprint(sorted(map(list, _tensors(files)))))


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a large file; it is read again only after something changed it."""
    return _remembered("file", [path], lambda: hash_file(path))


def cached_model(name: str, parts: Sequence[object], write: Callable[[Path], object]) -> Path:
    """The directory in the cache of a model that is made of others, made if it is not whole there.

    Args:
        name: how the directory begins.
        parts: all that decides its content, as a JSON value; digests of files, not their times.
        write: writes the model into an empty directory.
    """
    directory = cache_directory() / "models" / f"{name}-{fingerprint(parts)[:32]}"
    if not _is_whole(directory):
        # Ranks on one machine start together.
        with locked(directory.parent, wait=True):
            if not _is_whole(directory):
                with write_dir(directory) as temporary:
                    write(temporary)
                    write_text(temporary / _WRITTEN, hash_tree(temporary))
    return directory


def _is_whole(directory: Path) -> bool:
    """True if every file of a converted model is as it was written."""
    try:
        written = read_text(directory / _WRITTEN)
        files = visible_files(directory)
        return written == _remembered("tree", files, lambda: hash_tree(directory))
    except (OSError, ValueError):
        return False


def _remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """A digest of files' content, from the cache while no program changed one of them.

    Reading gigabytes takes seconds, asking for their state does not.
    """
    started, states = time.time(), [file_state(file) for file in files]
    key = fingerprint([kind, [[str(file.absolute()), *s] for file, s in zip(files, states)]])
    path = cache_directory() / "digests" / f"{key}.json"
    found = json_or_none(path)
    if isinstance(found, list) and len(found) == 2 and found[1] == fingerprint([key, found[0]]):
        return str(found[0])
    digest = compute()
    latest = max((max(state[-2:]) for state in states), default=0) / 1e9
    same = states == [file_state(file) for file in files]
    if same and latest + _SETTLED_SECONDS < started:
        # A cache that cannot be written makes this slower, not wrong.
        with contextlib.suppress(OSError):
            write_json(path, [digest, fingerprint([key, digest])])
    return digest


def _tensors(files: Sequence[Path]) -> list[tuple[str, str, list[int], str]]:
    """Name, dtype, shape and hex SHA-256 of the numbers of every tensor."""
    found = []
    for path in files:
        try:
            with open_file(path) as file:
                nbytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(nbytes, path.stat().st_size)))
                header.pop("__metadata__", None)
                for name, one in header.items():
                    start, stop = one["data_offsets"]
                    file.seek(8 + nbytes + start)
                    digest = hashlib.sha256()
                    for at in range(start, stop, 1 << 20):
                        digest.update(file.read(min(1 << 20, stop - at)))
                    found.append((name, one["dtype"], one["shape"], digest.hexdigest()))
        except _UNREADABLE as error:
            raise ModelError(
                f"{path}: not readable as safetensors ({error}); download it again"
            ) from None
    return found
