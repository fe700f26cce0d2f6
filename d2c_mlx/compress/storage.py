"""What a plan may store adapters as, and its bytes: one compact file, or a GGUF for each.

The planner asks a storage for the levels that fit some bytes, for the exact bytes of a candidate
and of a choice, and for the adapter in that form, which is measured and then written as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import (
    ARCHITECTURES,
    GgufAdapter,
    export_names,
    gguf_nbytes,
    row_nbytes,
    save_gguf,
)
from d2c_mlx.compress.affine import Levels, packed_columns
from d2c_mlx.compress.allocate import Candidate, allocate
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.file_layout import (
    COMPACT,
    compact_nbytes,
    estimate_header_nbytes,
    make_index,
)
from d2c_mlx.compress.gguf_form import GGUF_LOST, gguf_store, kinds
from d2c_mlx.compress.quantize import Components, compress
from d2c_mlx.utils.errors import ConfigError

__all__ = ["GROUP_SIZE", "CompactStorage", "GgufStorage", "Storage", "compact_store"]

# Numbers that share a scale and a bias in a compact pack.
GROUP_SIZE = 64
Worth = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, int]]


class Storage(Protocol):
    """A form of a plan.

    Attributes:
        most: family -> the largest share of the 16-bit bytes to try. For a task adapter it is above
            what 4 bits take, whose loss hardly shows; for a merge it is 8 bits, since a merge has
            the shares of several tasks.
    """

    most: Mapping[str, float]

    @property
    def header_nbytes(self) -> int:
        """Bytes that are set aside for what all adapters share."""

    def allocate(self, values: Worth, nbytes: float) -> dict[str, Levels]:
        """Module path -> levels with the most worth that fit; modules without any are left out."""

    def nbytes(self, name: str, levels: Mapping[str, Levels]) -> int:
        """Bytes of one adapter of this name."""

    def total(self, chosen: Sequence[Candidate]) -> int:
        """Bytes of all files, an upper bound."""

    def store(
        self, adapter: Adapter, levels: Mapping[str, Levels], parts: Mapping[str, Components] | None
    ) -> Compressed | GgufAdapter:
        """The adapter in this form; arguments of `compact_store`."""

    def write(self, directory: Path, adapters: Sequence[Any]) -> None:
        """Write adapters in this form into an empty directory, in their order."""


class CompactStorage:
    """All adapters in one compact file, see `compact_file`."""

    most: Mapping[str, float] = {"own": 0.35, "merged": 0.54}

    def __init__(self, names: Sequence[str], base: str | None, shapes: Shapes) -> None:
        """Store adapters of these names and of modules of these shapes."""
        self._names, self._base, self._shapes = names, base, shapes

    @cached_property
    def header_nbytes(self) -> int:
        """Bytes that are set aside for the header."""
        return estimate_header_nbytes(self._names, self._base or "", self._shapes, GROUP_SIZE)

    def allocate(self, values: Worth, nbytes: float) -> dict[str, Levels]:
        """See `Storage`."""
        widths = {path: sum(self._shapes[path]) for path in values}
        return {path: some for path, some in allocate(values, widths, nbytes).items() if some}

    def nbytes(self, name: str, levels: Mapping[str, Levels]) -> int:
        """Bytes of rows and of the adapter's part of the index."""
        # A count per module and bit width, of which most have 3.
        total = 3 * len(self._shapes)
        for path, some in levels.items():
            for n, bits in some:
                for width in self._shapes[path]:
                    words, groups = packed_columns(width, bits, GROUP_SIZE)
                    total += n * ((2 if bits == 16 else 4) * words + 4 * groups)
        return total

    def total(self, chosen: Sequence[Candidate]) -> int:
        """Bytes of the file; an upper bound, since components may turn out to be zero."""
        some = [one for one in chosen if one.stored]
        counts = [
            {path: {bits: n for n, bits in levels} for path, levels in one.levels.items()}
            for one in some
        ]
        forms = [one.stored for one in some if one.stored]
        base = next((one.base for one in forms if one.base), None)
        names = [one.name for one in forms]
        return compact_nbytes(make_index(names, base, counts, self._shapes, GROUP_SIZE))

    def store(
        self, adapter: Adapter, levels: Mapping[str, Levels], parts: Mapping[str, Components] | None
    ) -> Compressed:
        """See `Storage`."""
        return compact_store(adapter, levels, parts=parts)

    def write(self, directory: Path, adapters: Sequence[Compressed]) -> None:
        """See `Storage`."""
        write_compact(directory / COMPACT, adapters)


class GgufStorage:
    """A GGUF for every adapter, whose headers and padding count."""

    # The whole adapter at 8 bits, whose second factor has 16.
    most: Mapping[str, float] = {"own": 0.8, "merged": 0.8}
    header_nbytes = 0

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        """Store adapters of modules of these shapes.

        Args:
            shapes: module path -> (in, out).
            config: the base model's config.json.

        Raises:
            ConfigError: its tensors in GGUF are not known.
            AdapterError: modules that have no name in GGUF.
        """
        if config.get("model_type") not in ARCHITECTURES:
            raise ConfigError(
                f"format: 'gguf' with a base model of model_type {config.get('model_type')!r},"
                " whose names in GGUF are not known here; expected one of"
                f" {', '.join(ARCHITECTURES)}"
            )
        self._shapes, self._config = shapes, config
        self._places = export_names(shapes, config, "format")
        self._module_nbytes = cache(self._count_module)

    def allocate(self, values: Worth, nbytes: float) -> dict[str, Levels]:
        """See `Storage`: greedy along each module's concave hull of worth over bytes."""
        steps = [step for path, worth in values.items() for step in self._steps(path, worth)]
        # A module's steps have falling worth per byte, so they keep their order.
        steps.sort(key=lambda step: -step[0])
        found: dict[str, Levels] = {}
        full: set[str] = set()
        free = nbytes - self.nbytes("", {})
        for _, path, cost, level in steps:
            if path in full or cost > free:
                full.add(path)
            else:
                found[path], free = (level,), free - cost
        return found

    def _steps(self, path: str, worth: np.ndarray) -> list[tuple[float, str, int, tuple[int, int]]]:
        """Worth per byte, path, more bytes and level of every step of one module."""
        kept = np.cumsum(worth)
        offered = sorted(
            (self._module_nbytes(path, n, bits), float(kept[n - 1]) * (1 - lost), (n, bits))
            for n in range(1, len(worth) + 1)
            for bits, lost in GGUF_LOST.items()
        )
        hull: list[tuple[int, float, tuple[int, int]]] = [(0, 0.0, (0, 0))]
        for point in offered:
            if point[1] <= hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return [(_slope(a, b), path, b[0] - a[0], b[2]) for a, b in zip(hull, hull[1:])]

    def _count_module(self, path: str, n: int, bits: int) -> int:
        """Bytes that a module adds to a file, to the padding of its header."""
        return gguf_nbytes("", [self._sizes(path, n, bits)], self._config) - self.nbytes("", {})

    def _sizes(self, path: str, n: int, bits: int) -> tuple[str, int, int]:
        """Name in the GGUF, and bytes of both factors."""
        n_in, n_out = self._shapes[path]
        a, b = kinds(n_in, n, bits)
        return self._places[path], n * row_nbytes(a, n_in), n_out * row_nbytes(b, n)

    def nbytes(self, name: str, levels: Mapping[str, Levels]) -> int:
        """Exact bytes of the file."""
        tensors = [self._sizes(path, *level) for path, (level,) in levels.items()]
        return gguf_nbytes(name, tensors, self._config)

    def total(self, chosen: Sequence[Candidate]) -> int:
        """Exact bytes of all files."""
        return sum(one.nbytes for one in chosen)

    def store(
        self, adapter: Adapter, levels: Mapping[str, Levels], parts: Mapping[str, Components] | None
    ) -> GgufAdapter:
        """See `Storage`."""
        return gguf_store(adapter, levels, parts)

    def write(self, directory: Path, adapters: Sequence[GgufAdapter]) -> None:
        """See `Storage`: `0.gguf`, `1.gguf`, ..."""
        for k, adapter in enumerate(adapters):
            save_gguf(adapter, directory / f"{k}.gguf", self._config)


def _slope(a: tuple[int, float, Any], b: tuple[int, float, Any]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else float("inf")


def compact_store(
    adapter: Adapter,
    levels: Mapping[str, Levels],
    scale: float = 1.0,
    size: int = GROUP_SIZE,
    parts: Mapping[str, Components] | None = None,
) -> Compressed:
    """Quantize an adapter into its form in a compact pack.

    Use it to try allocations that drop modules; `quantize.compress` wants levels for every module.

    Args:
        adapter: any ranks and scales.
        levels: module path -> bit allocation; modules that are missing are dropped.
        scale: factor of dW.
        size: numbers that share a scale and a bias.
        parts: `svd_components` of the adapter, if they are known.

    Raises:
        ConfigError: levels that cannot be stored, as `quantize.check_levels`.
    """
    every = {path: levels.get(path, ()) for path in adapter.modules}
    return compress(adapter, every, size, parts=parts).scaled(scale)
