"""Factors of a LoRA as a GGUF holds them: in 16 or 32 bits, or quantized in blocks.

llama.cpp keeps the type of every factor, and scales each pair by alpha / its own rank, or by 1
where the file has no alpha. So ranks and types may differ per module. A row must divide into blocks
of its type: the row of `lora_a` is as wide as the module's input, that of `lora_b` as the rank.

Source: `llama-adapter.cpp` and `gguf.cpp`, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from d2c_mlx.adapters.adapter import Adapter, LoRA, balance_factors

__all__ = ["BLOCK", "QUANTIZED", "Factor", "GgufAdapter", "factors_of", "row_nbytes"]

# Numbers in a block of the types that we write.
BLOCK = 32
_FLOATS = {np.dtype("f2"): GGMLQuantizationType.F16, np.dtype("f4"): GGMLQuantizationType.F32}
# Quantized types that are read and written -> float16 numbers that begin a block; the rest of it is
# codes.
QUANTIZED = {
    GGMLQuantizationType.Q4_0: 1,
    GGMLQuantizationType.Q4_1: 2,
    GGMLQuantizationType.Q8_0: 1,
}


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a module.

    Attributes:
        kind: the type of its numbers.
        data: `(rows, width)` float16 or float32, or the bytes of its blocks, uint8
            `(rows, row_nbytes)`.
    """

    kind: GGMLQuantizationType
    data: np.ndarray

    @staticmethod
    def plain(numbers: np.ndarray) -> Factor:
        """A factor that is not quantized; the numbers are float16 or float32."""
        return Factor(_FLOATS[numbers.dtype], np.ascontiguousarray(numbers))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        n, nbytes = GGML_QUANT_SIZES[self.kind]
        return self.data.shape[1] * self.data.dtype.itemsize * n // nbytes

    def values(self) -> np.ndarray:
        """The numbers that a reader gets, `(rows, width)`: float32 if they are quantized."""
        return dequantize(self.data, self.kind) if self.kind in QUANTIZED else self.data

    def scaled(self, factor: float) -> Factor:
        """The numbers times a factor; of quantized ones the codes stay."""
        if self.kind not in QUANTIZED:
            return replace(self, data=(self.data * np.float32(factor)).astype(self.data.dtype))
        blocks = self.data.reshape(-1, GGML_QUANT_SIZES[self.kind][1]).copy()
        end = 2 * QUANTIZED[self.kind]
        scales = blocks[:, :end].copy().view(np.float16) * np.float32(factor)
        blocks[:, :end] = scales.astype(np.float16).view(np.uint8)
        return replace(self, data=blocks.reshape(self.data.shape))


@dataclass(frozen=True)
class GgufAdapter:
    """An adapter whose factors are as a GGUF holds them, but for the order of rows.

    Attributes:
        name: the adapter's name.
        modules: module path -> `lora_a (r, in)` and `lora_b (out, r)`, rows as the model in mlx-lm
            has them.
        alpha: every dW is times alpha / its own rank; None is times 1.
        base: the base model's name.
    """

    name: str
    modules: Mapping[str, tuple[Factor, Factor]]
    alpha: float | None = None
    base: str | None = None

    def scaled(self, factor: float) -> GgufAdapter:
        """The adapter with every dW times a factor, in `lora_b`; the bytes are as many."""
        if factor == 1:
            return self
        modules = {path: (a, b.scaled(factor)) for path, (a, b) in self.modules.items()}
        return replace(self, modules=modules)

    def adapter(self, dtype: mx.Dtype | None = None) -> Adapter | None:
        """The plain adapter with the numbers that a reader gets; None if no module is left.

        Args:
            dtype: of its factors, with one rank, see `Adapter.uniform`; None keeps ranks and gives
                float32 for quantized factors.
        """
        modules = {}
        for path, pair in sorted(self.modules.items()):
            a, b = (mx.array(np.ascontiguousarray(x.values().T)) for x in pair)
            modules[path] = LoRA(a, b, self.alpha / a.shape[1] if self.alpha else 1.0)
        if not modules:
            return None
        found = Adapter(self.name, modules, self.base)
        return found if dtype is None else found.uniform(dtype)


def row_nbytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of a row of so many numbers, which must divide into blocks."""
    n, nbytes = GGML_QUANT_SIZES[kind]
    return width // n * nbytes


def factors_of(adapter: Adapter) -> GgufAdapter:
    """The factors of an adapter in 16 or 32 bits, each module with its own rank.

    Components that are zero, such as padding, are left out. Where ranks and scales are all the same
    no bit changes and alpha = scale * rank. Else scales are folded into b, rounded to its type; to
    float32 where they are too large for it.

    float16 and float32 stay. bfloat16 becomes float16, which holds its numbers exactly down to
    8e-6; where one is too large for it, float32: not every backend has bfloat16.
    """
    loras = {path: _own_rank(lora) for path, lora in adapter.modules.items()}
    # A file needs a module, even if all of them are zero.
    loras = {path: lora for path, lora in loras.items() if lora.rank} or dict(adapter.modules)
    same = len({(lora.rank, lora.scale) for lora in loras.values()}) == 1
    first = next(iter(loras.values()))
    modules = {}
    for path, lora in loras.items():
        a, b = _numpy(lora)
        if not same and lora.scale != 1:
            folded = b * np.float32(lora.scale)
            b = folded.astype(b.dtype) if np.abs(folded).max() <= np.finfo(b.dtype).max else folded
        modules[path] = Factor.plain(a.T), Factor.plain(b.T)
    alpha = first.scale * first.rank if same and first.scale != 1 else None
    return GgufAdapter(adapter.name, modules, alpha, adapter.base)


def _own_rank(lora: LoRA) -> LoRA:
    """The LoRA without the components that are zero."""
    a, b = (np.array(x.astype(mx.float32)) for x in (lora.a, lora.b))
    kept = np.flatnonzero(a.any(axis=0) & b.any(axis=1))
    if len(kept) == lora.rank:
        return lora
    at = mx.array(kept.astype(np.int32))
    return LoRA(lora.a[:, at], lora.b[at], lora.scale)


def _numpy(lora: LoRA) -> tuple[np.ndarray, np.ndarray]:
    """Both factors in float16 or float32."""
    a, b = lora.a, lora.b
    if mx.bfloat16 in (a.dtype, b.dtype):
        a, b = balance_factors(a, b)
        half = np.array(a.astype(mx.float16)), np.array(b.astype(mx.float16))
        if np.isfinite(half[0]).all() and np.isfinite(half[1]).all():
            return half
    return np.array(a), np.array(b)
