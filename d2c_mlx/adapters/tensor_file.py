"""Reading safetensors files of strangers: the header is checked before any number is used.

Every reader of this package goes through `open_tensors`: adapters, compact packs and routers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from d2c_mlx.adapters.checks import check_finite
from d2c_mlx.utils.errors import AdapterError, InputError
from d2c_mlx.utils.files import open_file
from d2c_mlx.utils.parsing import parse_json

__all__ = ["Header", "TensorFile", "open_tensors", "read_header", "read_tensors"]

# Tensor name -> (dtype as safetensors names it, shape).
Header = dict[str, tuple[str, tuple[int, ...]]]
# Most tensors of a file and bytes of its header: ten times those of the largest adapters.
_MOST_TENSORS, _MOST_HEADER = 20_000, 16 << 20


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file.

    Attributes:
        header: name -> (dtype, shape) of every tensor.
        metadata: strings by name; empty without any.
        handle: of `safetensors.safe_open`, for `get_tensor` and `get_slice` (NumPy arrays).
    """

    header: Header
    metadata: dict[str, str]
    handle: Any


@contextlib.contextmanager
def open_tensors(
    path: Path,
    error: type[InputError] = AdapterError,
    fault: str = "missing, truncated or not a safetensors file",
) -> Iterator[TensorFile]:
    """Open a safetensors file whose header fits the file; nothing but the header is read.

    Use it to look at names, dtypes and shapes, or to read some of the tensors; `read_tensors` reads
    all numbers of an adapter as MLX arrays.

    Args:
        path: the file.
        error: raised for a file that is none, also by reads inside the block.
        fault: what the message calls such a file.

    Raises:
        InputError: `error`, for a file that is missing, truncated or longer than its header says,
            whose tensors overlap or do not have the size of their shape, or that has two tensors
            of one name (of which MLX and Swift need not take the same one).
    """
    try:
        # safe_open checks offsets, sizes and dtypes against the file; mx.load alone is lazy.
        text = _header_text(path)
        with safe_open(str(path), framework="numpy") as handle:
            header = _parse_header(text)
            yield TensorFile(header, handle.metadata() or {}, handle)
    except (SafetensorError, OSError, _HeaderError) as caught:
        reason = str(caught).splitlines()[0]
        raise error(f"{path}: {fault} ({reason}); copy it again") from None


class _HeaderError(Exception):
    """A header that safetensors itself takes."""


def _header_text(path: Path) -> bytes:
    """The JSON of a header, before anybody makes objects of it."""
    with open_file(path) as file:
        nbytes = int.from_bytes(file.read(8), "little")
        text = file.read(min(nbytes, _MOST_HEADER + 1))
    if len(text) > _MOST_HEADER:
        raise _HeaderError(f"a header of more than {_MOST_HEADER:,} bytes")
    return text


def _parse_header(text: bytes) -> Header:
    """The tensors of a header that safetensors has taken."""
    try:
        entries = parse_json(text.decode())
    except ValueError as error:
        raise _HeaderError(str(error)) from None
    entries.pop("__metadata__", None)
    if len(entries) > _MOST_TENSORS:
        raise _HeaderError(f"{len(entries):,} tensors, at most {_MOST_TENSORS:,} are read")
    return {name: (one["dtype"], tuple(one["shape"])) for name, one in entries.items()}


def read_header(path: Path) -> Header:
    """Names, dtypes and shapes of an adapter's tensors; raises AdapterError as `open_tensors`."""
    with open_tensors(path) as file:
        return file.header


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read all tensors of an adapter, in the dtypes of the file.

    Raises:
        AdapterError: as `open_tensors`; or there is no tensor, or one that holds NaN, infinity or
            no floating point numbers.
    """
    fault = "truncated or not a safetensors file"
    with open_tensors(path, fault=fault) as file:
        dtypes = {name: dtype for name, (dtype, _) in file.header.items()}
    # MLX has no float64, and says no more than that.
    double = [name for name, dtype in dtypes.items() if dtype == "F64"]
    if double:
        raise AdapterError(
            f"{path}: {len(double)} tensors are in float64 (first: {min(double)}), which MLX"
            " does not have; save the adapter in float16, bfloat16 or float32"
        )
    try:
        tensors: Any = mx.load(str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(f"{path}: {fault} ({reason}); copy it again") from None
    if not dtypes:
        raise AdapterError(f"{path}: holds no tensors")
    whole = [name for name, x in tensors.items() if not mx.issubdtype(x.dtype, mx.floating)]
    if whole:
        raise AdapterError(
            f"{path}: {len(whole)} tensors hold no floating point numbers (first: {min(whole)},"
            f" {tensors[min(whole)].dtype}); save the adapter in float16, bfloat16 or float32"
        )
    check_finite(tensors, path)
    return tensors
