"""Layout of a compact file: the index of which rows are where, and the header that holds it.

Factors are rows: the columns of `a` (width `in`) and the rows of `b` (width `out`), ordered by
adapter, module, `a` before `b`, component. All of the same bits and width are one tensor:

- `<bits>bit.<width>.weight`: uint32 `(rows, ceil(width / group) * group * bits / 32)`, codes from
  the lowest bit up; at 16 bits float16 `(rows, width)`.
- `<bits>bit.<width>.scales` and `.biases`: float16 `(rows, ceil(width / group))`; none at 16 bits.
- `counts`: uint8 `(adapters, modules, bits)`, components of a module at these bits.

The metadata holds `format`, `version` and `index`, a JSON object: `base`, `names`, `bits` (last
axis of `counts`), `group_size`, and `modules` (middle axis), folded as
`["model.layers.*.self_attn.q_proj", in, out, "0-15,17"]`. A number is `scale * code + bias` in
float32, rounded to float16; codes beyond the width are padding. dW^T is the sum of a times b.

A file's size is known before anything is quantized; the planner asks `compact_nbytes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_mlx.compress.compressed import packed_columns
from d2c_mlx.utils.errors import PackError

__all__ = [
    "BLOCK",
    "COMPACT",
    "DTYPES",
    "FIELDS",
    "FORMAT",
    "MAX_COUNT",
    "VERSION",
    "Index",
    "compact_nbytes",
    "estimate_header_nbytes",
    "expand_modules",
    "header_bytes",
    "make_index",
    "tensor_name",
]

COMPACT, FORMAT, VERSION = "compact.safetensors", "d2c-mlx-compact", "1"
# The number of a block in a module's path.
BLOCK = re.compile(r"\.[0-9]+\.")
DTYPES: dict[str, np.dtype[Any]] = {
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
_LAYER = re.compile(r"(.*?\.)(0|[1-9][0-9]*)(\..*)")
FIELDS = ("weight", "scales", "biases")
# Most components of a module at the same bits: one byte counts them.
MAX_COUNT = 255
# Most characters of a module's path, numbers of a row, and modules of a model.
_MOST_PATH, _MOST_WIDTH, _MOST_MODULES = 256, 1 << 24, 1 << 16


@dataclass(frozen=True, eq=False)
class Index:
    """Everything in a compact file except the rows: which adapter's rows are where.

    Rows of all adapters are stacked by bits and width, not by module. That gives the fewest
    tensors, and one adapter is one slice of each.

    Attributes:
        names: the adapters' names.
        base: the base model's name.
        modules: `(path, in, out)` of every module that some adapter has, in the file's order.
        bits: bit widths that some module uses, falling.
        group_size: numbers that share a scale and a bias, in all rows.
        counts: uint8 `(n_adapters, n_modules, n_bits)`, components at each bit width.
    """

    names: tuple[str, ...]
    base: str | None
    modules: tuple[tuple[str, int, int], ...]
    bits: tuple[int, ...]
    group_size: int
    counts: np.ndarray

    def rows(self) -> dict[tuple[int, int], np.ndarray]:
        """(bits, row width) -> number of rows of every adapter, `(n_adapters,)`."""
        shapes = np.array([shape for _, *shape in self.modules], np.int64).reshape(-1, 2)
        widths, places = np.unique(shapes, return_inverse=True)
        # (width, adapter, bits), in one pass over the modules whatever their number of widths.
        rows = np.zeros((len(widths), len(self.counts), len(self.bits)), np.int64)
        for place in places.reshape(-1, 2).T:
            np.add.at(rows, place, self.counts.swapaxes(0, 1))
        found = {
            (self.bits[level], int(widths[w])): rows[w, :, level]
            for w, level in np.argwhere(rows.any(axis=1))
        }
        return dict(sorted(found.items(), reverse=True))

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (safetensors dtype, shape), in the file's order: wide types first."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {"counts": ("U8", self.counts.shape)}
        for (bits, width), rows in self.rows().items():
            words, groups = packed_columns(width, bits, self.group_size)
            n = int(rows.sum())
            found[tensor_name(bits, width, "weight")] = ("F16" if bits == 16 else "U32", (n, words))
            if groups:
                found |= {tensor_name(bits, width, f): ("F16", (n, groups)) for f in FIELDS[1:]}
        return dict(sorted(found.items(), key=lambda item: list(DTYPES).index(item[1][0])))


def tensor_name(bits: int, width: int, field: str) -> str:
    """The name of one tensor: `4bit.2048.weight` has all rows of 2048 numbers at 4 bits."""
    return f"{bits}bit.{width}.{field}"


def make_index(
    names: Sequence[str],
    base: str | None,
    counts: Sequence[Mapping[str, Mapping[int, int]]],
    shapes: Mapping[str, tuple[int, int]],
    group_size: int,
) -> Index:
    """Make an index from counts of components alone, to ask `compact_nbytes` for a size.

    Use `compact_file.index_of` for adapters that are quantized already.

    Args:
        names: the adapters' names.
        base: the base model's name.
        counts: per adapter, module path -> bits -> number of components, 0 or more.
        shapes: module path -> (in, out), of at least those modules.
        group_size: one of `affine.GROUP_SIZES`.

    Raises:
        PackError: more than 255 components of a module at the same bits.
    """
    paths = {path for one in counts for path, levels in one.items() if any(levels.values())}
    modules = tuple((path, *shapes[path]) for path in paths)
    modules = tuple(sorted(modules, key=lambda m: (_split(m[0])[0], m[1:], _split(m[0])[1])))
    used = {b for one in counts for levels in one.values() for b, n in levels.items() if n}
    bits = sorted(used, reverse=True)
    table = np.array(
        [[[one.get(path, {}).get(b, 0) for b in bits] for path, *_ in modules] for one in counts],
        np.int64,
    ).reshape(len(counts), len(modules), len(bits))
    most = int(np.max(table, initial=0))
    if most > MAX_COUNT:
        raise PackError(f"{most} components of one module at the same bits; {MAX_COUNT} fit")
    return Index(tuple(names), base, modules, tuple(bits), group_size, table.astype(np.uint8))


def compact_nbytes(index: Index) -> int:
    """Exact size in bytes of the file that this index describes, header included."""
    tensors = index.tensors().values()
    return len(header_bytes(index)) + sum(_nbytes(dtype, shape) for dtype, shape in tensors)


def estimate_header_nbytes(
    names: Sequence[str], base: str | None, shapes: Mapping[str, tuple[int, int]], group_size: int
) -> int:
    """Estimate from above the bytes of a header, for a pack of these adapters, merged or not.

    Use it before counts are known; `compact_nbytes` is exact. The estimate is the header of a pack
    of all adapters and their merge at 4, 3 and 2 bits. Nearly every pack stays below it.

    Args:
        names: the adapters' names.
        base: the base model's name.
        shapes: module path -> (in, out) of all modules.
        group_size: one of `affine.GROUP_SIZES`.
    """
    full = {path: {4: 1, 3: 1, 2: 1} for path in shapes}
    index = make_index([*names, "+".join(names)], base, [full] * (len(names) + 1), shapes,
                       group_size)  # fmt: skip
    # Numbers in the real header may have a few digits more.
    return len(header_bytes(index)) + 512


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize


def header_bytes(index: Index) -> bytes:
    """The beginning of the file: length and JSON header, padded to a multiple of 8 bytes.

    It is written here because the safetensors package does not fix the order of metadata, and the
    same adapters must give the same bytes.
    """
    about = {
        "base": index.base,
        "names": index.names,
        "bits": index.bits,
        "group_size": index.group_size,
        "modules": _collapse(index.modules),
    }
    content: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "version": VERSION, "index": _dump(about)}
    }
    start = 0
    for name, (dtype, shape) in index.tensors().items():
        stop = start + _nbytes(dtype, shape)
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = _dump(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _split(path: str) -> tuple[str, int]:
    """`model.layers.3.mlp.up_proj` -> (`model.layers.*.mlp.up_proj`, 3); -1 without a layer."""
    match = _LAYER.fullmatch(path)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match else (path, -1)


def _collapse(modules: Sequence[tuple[str, int, int]]) -> list[list[Any]]:
    """Modules as `[pattern, in, out, "0-15,17"]`, one entry per module of a block.

    This is 20 times shorter than all paths; `expand_modules` reads it.
    """
    runs: list[list[Any]] = []
    for path, width, out in modules:
        pattern, layer = _split(path)
        if not runs or runs[-1][:3] != [pattern, width, out]:
            runs.append([pattern, width, out, []])
        spans = runs[-1][3]
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    for run in runs:
        some = [f"{low}-{high}" if high > low else f"{low}" for low, high in run[3]]
        run[3] = ",".join(some) if run[3] != [[-1, -1]] else ""
    return runs


def expand_modules(runs: Sequence[Sequence[Any]], most: int) -> tuple[tuple[str, int, int], ...]:
    """`(path, in, out)` of every module, from the patterns in a header.

    Args:
        runs: lists of `[pattern, in, out, layers]`, with layers such as "0-15,17".
        most: number of modules that the file's counts have room for.

    Raises:
        ValueError: more than `most` modules, malformed patterns, or paths and widths that no model
            has: a pattern of many stars would become thousands of long paths.
    """
    modules: list[tuple[str, int, int]] = []
    for pattern, width, out, spans in runs:
        if len(pattern) > _MOST_PATH or not 0 < min(width, out) <= max(width, out) <= _MOST_WIDTH:
            raise ValueError("a path or a width beyond those of any model")
        for span in spans.split(","):
            low, _, high = span.partition("-")
            layers = range(int(low), int(high or low) + 1) if span else (-1,)
            if len(layers) > min(most, _MOST_MODULES) - len(modules):
                raise ValueError(f"more than {most} modules")
            for layer in layers:
                path = pattern if layer < 0 else pattern.replace("*", str(layer))
                modules.append((path, int(width), int(out)))
    return tuple(modules)
