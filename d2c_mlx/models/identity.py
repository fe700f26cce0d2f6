"""Which base model a directory holds, by content, and models converted once that stay whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

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

__all__ = ["cached_model", "config_digest", "file_digest", "same_weights", "weights_digest"]

# A file that changed so lately may change again within one tick of the file system's clock.
_SETTLED_SECONDS = 2
# In a converted model: the hash of its other files, as they were written.
_WRITTEN = ".sha256"
_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Numbers of a tensor that tell whether it is another's copy.
_BEGINNING = 256
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


def same_weights(one: Path, other: Path) -> bool:
    """True if two model directories hold the same tensors, but perhaps in another precision.

    The first numbers of each tensor are compared, packed ones unpacked: a float32 copy of a
    quantized model is the same, a quantized copy of another is not, nor what cannot be read.
    """
    try:
        first, second = map(_beginnings, (one, other))
    except ModelError:
        return False
    if not first or first.keys() != second.keys():
        return False
    for name, (shape, dtype, x) in first.items():
        other_shape, other_dtype, y = second[name]
        # The coarser of the two, the last of the table.
        kind = _FLOATS[max(dtype, other_dtype, key=list(_FLOATS).index)]
        n = min(x.size, y.size)
        if shape != other_shape or not mx.array_equal(x[:n].astype(kind), y[:n].astype(kind)):
            return False
    return True


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
    for file, name, entry, nbytes in _entries(files):
        digest = hashlib.sha256()
        for at in range(0, nbytes, 1 << 20):
            digest.update(file.read(min(1 << 20, nbytes - at)))
        found.append((name, entry["dtype"], entry["shape"], digest.hexdigest()))
    return found


_Beginnings = dict[str, tuple[list[int], str, mx.array]]


def _beginnings(directory: Path) -> _Beginnings:
    """Name -> shape, dtype and first numbers of every tensor of a model, packed ones unpacked."""
    found: _Beginnings = {}
    for file, name, entry, nbytes in _entries(sorted(directory.glob("model*.safetensors"))):
        kind = {**_FLOATS, "U32": mx.uint32}.get(entry["dtype"])
        if kind is not None:
            n = min(nbytes, _BEGINNING * kind.size)
            data = mx.array(np.frombuffer(file.read(n), np.uint8)).view(kind)
            found[name] = (entry["shape"], entry["dtype"], data)
    packed = [name for name, (_, dtype, _) in found.items() if dtype == "U32"]
    return _unpacked(directory, found, packed) if packed else found


def _unpacked(directory: Path, found: _Beginnings, packed: Sequence[str]) -> _Beginnings:
    """The same with the numbers, in float32, of weights that mlx-lm quantized."""
    try:
        stated = json.loads(read_text(directory / "config.json"))["quantization"]
        for name in packed:
            module = name.removesuffix(".weight")
            about = {**stated, **stated.get(module, {})}
            bits, size = about["bits"], about["group_size"]
            (shape, _, words), (_, _, scales), (_, _, biases) = (
                found.pop(f"{module}.{part}") for part in ("weight", "scales", "biases")
            )
            width = shape[1] * 32 // bits
            n = min(width, _BEGINNING) // size
            x, a, b = words[None, : n * size * bits // 32], scales[None, :n], biases[None, :n]
            kinds = (a.astype(mx.float32), b.astype(mx.float32))
            numbers = mx.dequantize(x, *kinds, group_size=size, bits=bits)[0]
            found[name] = ([shape[0], width], "F32", numbers)
    except _UNREADABLE as error:
        raise ModelError(f"{directory}: quantized in a way that is not known ({error})") from None
    return found


def _entries(files: Sequence[Path]) -> Iterator[tuple[BinaryIO, str, dict[str, Any], int]]:
    """Yield every tensor: its file, opened where the numbers begin, name, entry and bytes."""
    for path in files:
        try:
            with open_file(path) as file:
                nbytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(nbytes, path.stat().st_size)))
                header.pop("__metadata__", None)
                for name, one in header.items():
                    start, stop = one["data_offsets"]
                    file.seek(8 + nbytes + start)
                    yield file, name, one, stop - start
        except _UNREADABLE as error:
            raise ModelError(
                f"{path}: not readable as safetensors ({error}); download it again"
            ) from None
