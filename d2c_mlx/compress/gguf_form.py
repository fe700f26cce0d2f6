"""Adapters of a plan in the form that a GGUF holds.

`lora_a` is quantized in blocks of 32 along the module's input. The rows of `lora_b` are as long as
the rank, so it is quantized only where that is a multiple of 32, and has 16 bits elsewhere. A
number is scale * code + bias, as in a compact pack; the bias is -8 (Q4_0) or -128 (Q8_0) times the
scale.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import (
    BLOCK,
    QUANTIZED,
    Factor,
    GgufAdapter,
    export_names,
    gguf_nbytes,
    row_nbytes,
    save_gguf,
)
from d2c_mlx.compress.compressed import Levels
from d2c_mlx.compress.quantize import (
    Components,
    gptq_round,
    hartley_rotation,
    solve,
    svd_components,
    together,
)
from d2c_mlx.utils.gguf_file import unpack_codes

# Bits of a plan -> type.
_KINDS = {16: Kind.F16, 8: Kind.Q8_0, 4: Kind.Q4_0}
# Bits that a plan offers -> share of the energy that they lose with `lora_b` in 16 bits: squared
# relative errors of a real adapter. The loss at 8 bits hardly shows, so 16 are not worth offering.
GGUF_LOST = {8: 0.003**2, 4: 0.045**2}


def gguf_store(
    adapter: Adapter, levels: Mapping[str, Levels], parts: Mapping[str, Components] | None = None
) -> GgufAdapter:
    """Quantize an adapter into the form of a plan; dW is what GGUF's own readers get.

    `lora_a` is rounded by `gptq_round`, and `lora_b` is solved anew, given the numbers that a
    reader gets.

    Args:
        adapter: any ranks and scales.
        levels: module path -> one level, components and bits of `lora_a`: 16, 8 or 4. Modules that
            are missing are dropped.
        parts: `svd_components` of the adapter, if they are known.
    """
    parts = parts or svd_components(adapter)
    modules: dict[str, tuple[Factor, Factor]] = {}
    for batch, pairs in together([*levels], parts):
        types, sizes = [], []
        for path, (a, _) in zip(batch, pairs):
            ((rank, bits),) = levels[path]
            types.append(kinds(a.shape[1], rank, bits))
            sizes.append([(rank, bits if types[-1][0] in QUANTIZED else 16)])
        every_a, every_b = zip(*pairs)
        fixed = [hartley_rotation(size) @ b[: size[0][0]] for size, b in zip(sizes, every_b)]
        rounded = gptq_round(fixed, every_b, every_a, sizes, BLOCK, symmetric=True)
        for path, (a, b), (kind, of_b), (codes,), rows in zip(batch, pairs, types, *rounded):
            best = solve(rows @ rows.T, (rows @ a.T) @ b).T
            first = codes.weight
            if kind in QUANTIZED:  # llama.cpp's layout of each type
                numbers = unpack_codes(first, codes.bits).reshape(len(first), -1, BLOCK)
                if kind == Kind.Q8_0:
                    numbers -= np.uint8(128)
                else:
                    numbers = numbers[..., : BLOCK // 2] | numbers[..., BLOCK // 2 :] << 4
                scales = codes.scales[..., None].astype("<f2").view("u1")
                first = np.concatenate([scales, numbers], axis=2).reshape(len(first), -1)
            second = quantize(np.ascontiguousarray(best, np.float32), of_b)
            modules[path] = Factor(kind, first), Factor(of_b, second)
    return GgufAdapter(adapter.name, dict(sorted(modules.items())), base=adapter.base)


def kinds(n_in: int, rank: int, bits: int) -> tuple[Kind, Kind]:
    """Types of `lora_a` and `lora_b` at these bits: 16 where rows do not divide into blocks."""
    a, b = (_KINDS[bits if width % BLOCK == 0 else 16] for width in (n_in, rank))
    return a, b


class GgufStorage:
    """A GGUF for every adapter, whose headers and padding count; see `storage.CompactStorage`."""

    # The whole adapter at 8 bits, whose second factor has 16.
    most: Mapping[str, float] = {"own": 0.8, "merged": 0.8}
    header_nbytes = 0

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]) -> None:
        """Store adapters of modules of these shapes.

        Args:
            shapes: module path -> (in, out).
            config: the base model's config.json.

        Raises:
            AdapterError: modules that have no name in GGUF.
        """
        self._shapes, self._config = shapes, config
        self._places = export_names(shapes, config, "format")
        # Bytes that a module adds to a file, with the padding of its header.
        self._module_nbytes = cache(
            lambda path, n, bits: self.nbytes("", {path: ((n, bits),)}) - self.nbytes("", {})
        )

    def allocate(self, values: Mapping[str, np.ndarray], nbytes: float) -> dict[str, Levels]:
        """Module path -> its one level, greedy along each module's hull of worth over bytes."""
        steps = []
        for path, worth in values.items():
            kept = np.cumsum(worth)
            left = [
                (self._module_nbytes(path, n, bits), float(kept[n - 1]) * (1 - lost), (n, bits))
                for n in range(1, len(worth) + 1)
                for bits, lost in GGUF_LOST.items()
            ]
            size, gain = 0, 0.0
            while left := [point for point in left if point[0] > size and point[1] > gain]:
                slopes = [(point[1] - gain) / (point[0] - size) for point in left]
                slope, (more, gain, level) = max(zip(slopes, left))
                steps.append((slope, path, more - size, level))
                size = more
        # A module's steps have falling worth per byte, so they keep their order.
        steps.sort(key=lambda step: -step[0])
        levels: dict[str, Levels] = {}
        full: set[str] = set()
        free = nbytes - self.nbytes("", {})
        for _, path, cost, level in steps:
            if path in full or cost > free:
                full.add(path)
            else:
                levels[path], free = (level,), free - cost
        return levels

    def nbytes(self, name: str, levels: Mapping[str, Levels]) -> int:
        """Exact bytes of the file of one adapter of this name."""
        tensors = []
        for path, ((n, bits),) in levels.items():
            n_in, n_out = self._shapes[path]
            a, b = kinds(n_in, n, bits)
            tensors.append((self._places[path], n * row_nbytes(a, n_in), n_out * row_nbytes(b, n)))
        return gguf_nbytes(name, tensors, self._config)

    def total(self, files: Sequence[tuple[Adapter, Mapping[str, Levels]]]) -> int:
        """Exact bytes of all files."""
        return sum(self.nbytes(adapter.name, levels) for adapter, levels in files)

    store = staticmethod(gguf_store)

    def write(self, directory: Path, adapters: Sequence[Any]) -> None:
        """Write adapters into an empty directory: `0.gguf`, `1.gguf`, ..."""
        for k, adapter in enumerate(adapters):
            save_gguf(adapter, directory / f"{k}.gguf", self._config)
