"""Reading GGUF files of strangers: metadata that may be damaged, and tensors of every type.

Block layouts are those of ggml: `ggml-common.h` and `ggml-quants.c`,
https://github.com/ggml-org/ggml.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from gguf.quants import Q4_K

# Errors that readers raise on bytes that are no GGUF.
GGUF_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
# Most weights that are unpacked at a time.
_AT_ONCE = 1 << 24
# Types that are groups of 32 values at even distances, which is what MLX computes with.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}


class UnknownTypeError(ValueError):
    """A tensor is of a type that the `gguf` package cannot read."""


class _Reader(GGUFReader):
    """The package's reader, which refuses what leads out of the file, on a plain view of its pages.

    The package believes the length that an array states: a single damaged bit fills the memory for
    hours. It takes two slices for each of a tokenizer's words, and one of `np.memmap` costs several
    times one of a plain array.
    """

    @property
    def data(self) -> np.ndarray:
        return self._pages

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._pages = mapped.view(np.ndarray)

    def _get(
        self,
        offset: int,
        dtype: Any,  # noqa: ANN401  as the package has it
        count: int = 1,
        override_order: Any = None,  # noqa: ANN401
    ) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self._pages):
            raise ValueError("a length leads out of the file")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file with the `gguf` package; use it in place of `GGUFReader`.

    Raises:
        UnknownTypeError: a tensor's type is none of the package's.
        GGUF_ERRORS: one of these, if the file is no GGUF or is damaged.
    """
    try:
        return _Reader(path)
    except ValueError as error:
        if GGMLQuantizationType.__name__ in str(error):
            raise UnknownTypeError(f"the type of a tensor: {error}") from None
        raise


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


def packed_rows(tensor: ReaderTensor, rows: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Rows of a matrix, exactly, at their number of bits, in MLX's affine quantization.

    Args:
        tensor: says the type.
        rows: its data, `(out, bytes)`.

    Returns:
        Words of q, uint32 `(out, in * bits / 32)`, scales and biases `(out, in / 32)`: each weight
        is scale * q + bias. They are float16, or float32 where that would round them. None for a
        type that MLX cannot hold so.
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
        q, scales, biases = (x.reshape(len(part), -1) for x in (q, scales, biases))
        parts.append((pack_codes(q, bits), scales, biases))
    return tuple(map(np.concatenate, zip(*parts)))


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


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of uint8 codes `(rows, n)`; `mx.quantize` packs only codes that it chose itself."""
    stream = np.unpackbits(np.ascontiguousarray(codes)[..., None], -1, bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """The uint8 codes `(rows, n)` in words of `pack_codes` or `mx.quantize`."""
    little = np.ascontiguousarray(words, "<u4").view(np.uint8)
    stream = np.unpackbits(little, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[..., 0]
