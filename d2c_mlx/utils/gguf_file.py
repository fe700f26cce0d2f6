"""Reading GGUF files of strangers: metadata that may be damaged, and tensors of every type.

Block layouts are those of ggml: `ggml-common.h` and `ggml-quants.c`,
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from gguf.quants import Q4_K

__all__ = ["GGUF_ERRORS", "Packed", "UnknownTypeError", "float_rows", "open_gguf", "packed_rows"]

# Errors that readers raise on bytes that are no GGUF.
GGUF_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
# GGUFValueType -> bytes of a value; strings and arrays state their length.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# Most weights that are unpacked at a time.
_AT_ONCE = 1 << 24
# Types that are groups of 32 values at even distances, which is what MLX computes with.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}


class UnknownTypeError(ValueError):
    """A tensor is of a type that the `gguf` package cannot read."""


class Packed(NamedTuple):
    """A matrix in MLX's affine quantization with groups of 32: w = scale * q + bias.

    Attributes:
        words: q, `(out, in * bits / 32)` in uint32.
        scales: `(out, in / 32)` in float16, or in float32 where that would round them.
        biases: as `scales`.
    """

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


class _Walk:
    """Numbers and values of a file, read one after another up to its end."""

    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self, width: int) -> int:
        self.skip(width)
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def skip(self, n: int) -> None:
        self.at += n
        if self.at > len(self.data):
            raise ValueError("a length in its metadata leads out of the file")

    def string(self) -> str:
        n = self.number(8)
        self.skip(n)
        return self.data[self.at - n : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number(8))
        elif kind == _ARRAY:
            inner, n = self.number(4), self.number(8)
            if inner in _WIDTHS:
                self.skip(n * _WIDTHS[inner])
            else:
                for _ in range(n):
                    self.value(inner)
        else:
            self.skip(_WIDTHS[kind])


class _Reader(GGUFReader):
    """The package's reader on a plain view of the file's pages.

    It takes two slices for each of a tokenizer's words, and one of `np.memmap` costs several times
    one of a plain array.
    """

    @property
    def data(self) -> np.ndarray:
        return self._pages

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._pages = mapped.view(np.ndarray)


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file with the `gguf` package, after checking lengths and types in its header.

    Use it in place of `GGUFReader`, which believes the length that an array states, also beyond the
    end of the file: a single damaged bit fills the memory for hours.

    Raises:
        UnknownTypeError: a tensor's type is none of the package's.
        GGUF_ERRORS: one of these, if the file is no GGUF or is damaged.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data, 8)
        n_tensors, n_values = walk.number(8), walk.number(8)
        for _ in range(n_values):
            walk.value(_STRING)
            walk.value(walk.number(4))
        ends = [_tensor_end(walk) for _ in range(n_tensors)]
        size = len(data)
    # The header is whole. Padding between it and the tensors only makes this exact to a few bytes.
    for name, kind, end in ends:
        if walk.at + end > size:
            raise ValueError(f"tensor {name} ({kind}) is cut short: the file ends within it")
    return _Reader(path)


def _tensor_end(walk: _Walk) -> tuple[str, str, int]:
    """Name, type and end of the next tensor, in bytes after the start of the data."""
    name, n_values = walk.string(), 1
    for _ in range(walk.number(4)):
        n_values *= walk.number(8)
    number, offset = walk.number(4), walk.number(8)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnknownTypeError(f"tensor {name} is of type {number}") from None
    values, nbytes = GGML_QUANT_SIZES[kind]
    return name, kind.name, offset + n_values // values * nbytes


def float_rows(tensor: ReaderTensor, rows: np.ndarray) -> np.ndarray:
    """Rows of a tensor as floats, exactly.

    Args:
        tensor: says the type.
        rows: its data or some rows of it, `(n, width)`, or `(n,)` of a vector.

    Returns:
        float16 for F16, else float32.

    Raises:
        UnknownTypeError: the `gguf` package does not dequantize this type.
    """
    kind = tensor.tensor_type
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return np.array(rows)
    try:
        return dequantize(rows, kind)
    except NotImplementedError:
        raise UnknownTypeError(f"tensor {tensor.name} is of type {kind.name}") from None


def packed_rows(tensor: ReaderTensor, rows: np.ndarray) -> Packed | None:
    """Rows of a matrix, exactly, at their number of bits; None for a type that MLX cannot hold so.

    Args:
        tensor: says the type.
        rows: its data, `(out, bytes)`.
    """
    kind = tensor.tensor_type
    bits = _BITS.get(kind.name)
    if bits is None:
        return None
    n = max(1, _AT_ONCE // int(tensor.shape[0]))
    parts = []
    for i in range(0, len(rows), n):
        part = rows[i : i + n]
        q, scales, biases = _affine(kind, part.reshape(-1, GGML_QUANT_SIZES[kind][1]))
        shape = (len(part), -1)
        parts.append(
            Packed(_words(q.reshape(shape), bits), scales.reshape(shape), biases.reshape(shape))
        )
    return Packed(*map(np.concatenate, zip(*parts)))


def _affine(
    kind: GGMLQuantizationType, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantized values, scales and biases of blocks, in groups of 32."""

    def half(at: int) -> np.ndarray:
        return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)

    name, d = kind.name, half(0)
    if name == "Q8_0":
        q, scales, biases = blocks[:, 2:] ^ 128, d, -128 * d
    elif name.endswith("_K"):
        sc, m = Q4_K.get_scale_min(blocks[:, 4:16])
        # Products of 17 bits.
        scales, biases = d * sc, -half(2) * m
        q = _nibbles(blocks[:, -128:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
        if name == "Q5_K":
            high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")
            q = q | high.swapaxes(1, 2) << 4
    else:
        q, scales = _nibbles(blocks[:, None, -16:]), d
        if name.startswith("Q5"):
            high = np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little")
            q = q.reshape(-1, 32) | high << 4
        middle = 1 << _BITS[name] - 1
        biases = half(2) if name.endswith("_1") else -middle * d
    exact = np.float32 if name.endswith("_K") else np.float16
    return q, scales.astype(exact), biases.astype(exact)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """Low halves of bytes, then their high halves, of every row: `(n, rows, m)` -> `2m` each."""
    return np.concatenate([x & 15, x >> 4], axis=-1)


def _words(q: np.ndarray, bits: int) -> np.ndarray:
    """Values of `bits` bits, `(out, in)`, one after another in little-endian words of 32 bits."""
    eight = q.reshape(len(q), -1, 8).astype(np.uint64) << (
        np.arange(8, dtype=np.uint64) * np.uint64(bits)
    )
    whole = eight.sum(axis=-1, dtype=np.uint64)
    data = np.ascontiguousarray(whole.astype("<u8")[..., None].view(np.uint8)[..., :bits])
    return data.reshape(len(q), -1).view(np.uint32)
