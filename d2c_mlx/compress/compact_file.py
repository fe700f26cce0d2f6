"""Many low-bit adapters in one safetensors file: its layout, its exact size, writing and reading.

A safetensors header takes about 100 bytes per tensor. For the 240 factors of one adapter that is
more than its numbers at 2 bit. So factors are rows, the columns of `a` (width `in`) and the rows of
`b` (width `out`), ordered by adapter, module, `a` before `b`, component. All of the same bits and
width are one tensor:

- `<bits>bit.<width>.weight`: uint32 `(rows, ceil(width / group) * group * bits / 32)`, codes from
  the lowest bit up; at 16 bits float16 `(rows, width)`. A group is 64 numbers.
- `<bits>bit.<width>.scales` and `.biases`: float16 `(rows, ceil(width / group))`; none at 16 bits.
- `counts`: uint8 `(adapters, modules, bits)`, components of a module at these bits.

The metadata holds `format`, `version` and `index`, a JSON object: `base`, `names`, `bits` (last
axis of `counts`), `group_size`, and `modules` (middle axis), folded as
`["model.layers.*.self_attn.q_proj", in, out, "0-15,17"]`. A number is `scale * code + bias` in
float32, rounded to float16; codes beyond the width are padding. dW^T is the sum of a times b.
docs/reference/formats.md explains it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from d2c_mlx.adapters.tensor_file import open_tensors
from d2c_mlx.compress.compressed import (
    BITS,
    GROUP_SIZE,
    Compressed,
    Level,
    Levels,
    Quantized,
    packed_columns,
)
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.parsing import parse_json

COMPACT, FORMAT, VERSION = "compact.safetensors", "d2c-mlx-compact", "1"
# The number of a block in a module's path.
BLOCK = re.compile(r"\.[0-9]+\.")
_LAYER = re.compile(r"(.*?\.)(0|[1-9][0-9]*)(\..*)")
# Bytes of a number of each type.
_DTYPES = {"U32": 4, "F16": 2, "U8": 1}
_FIELDS = ("weight", "scales", "biases")
# Most components of a module at the same bits: one byte counts them.
MAX_COUNT = 255
# Most characters of a module's path, numbers of a row, and modules of a model.
_MOST_PATH, _MOST_WIDTH, _MOST_MODULES = 256, 1 << 24, 1 << 16
# Most numbers of one factor in 16 bit; a vocabulary of 262,144 at rank 1,024 has as many.
_MOST_NUMBERS = 1 << 28


@dataclass(frozen=True, eq=False)
class Index:
    """Everything in a compact file except the rows: which adapter's rows are where.

    Attributes:
        names: the adapters' names.
        base: the base model's name.
        modules: `(path, in, out)` of every module that some adapter has, in the file's order.
        bits: bit widths that some module uses, falling.
        counts: uint8 `(n_adapters, n_modules, n_bits)`, components at each bit width.
    """

    names: tuple[str, ...]
    base: str | None
    modules: tuple[tuple[str, int, int], ...]
    bits: tuple[int, ...]
    counts: np.ndarray

    def rows(self) -> dict[tuple[int, int], np.ndarray]:
        """(bits, row width) -> number of rows of every adapter, `(n_adapters,)`."""
        rows: dict[int, Any] = {}
        for j, (_, *sides) in enumerate(self.modules):
            for width in sides:
                rows[width] = rows.get(width, 0) + self.counts[:, j].astype(np.int64)
        kinds = {
            (bits, width): counts[:, level]
            for width, counts in rows.items()
            for level, bits in enumerate(self.bits)
            if counts[:, level].any()
        }
        return dict(sorted(kinds.items(), reverse=True))

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (safetensors dtype, shape), in the file's order: wide types first."""
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {"counts": ("U8", self.counts.shape)}
        for (bits, width), rows in self.rows().items():
            words, groups = packed_columns(width, bits)
            kind, n = "F16" if bits == 16 else "U32", int(rows.sum())
            shapes = (kind, (n, words)), ("F16", (n, groups)), ("F16", (n, groups))
            tensors |= zip(_names(bits, width), shapes)
        return dict(sorted(tensors.items(), key=lambda item: list(_DTYPES).index(item[1][0])))


def _names(bits: int, width: int) -> list[str]:
    """Names of the tensors of one kind of rows, as far as these have all of `_FIELDS`."""
    return [f"{bits}bit.{width}.{field}" for field in _FIELDS[: 1 if bits == 16 else 3]]


def make_index(
    names: Sequence[str],
    base: str | None,
    levels: Sequence[Mapping[str, Levels]],
    shapes: Mapping[str, tuple[int, int]],
) -> Index:
    """Make an index from bit allocations alone, to ask `layout` for a size.

    Use `index_of` for adapters that are quantized already.

    Args:
        names: the adapters' names.
        base: the base model's name.
        levels: per adapter, module path -> bit allocation, of 0 or more components.
        shapes: module path -> (in, out), of at least those modules.
    """
    given = [(path, n, b) for adapter in levels for path, x in adapter.items() for n, b in x if n]
    paths = sorted({path for path, *_ in given}, key=lambda path: (
        _split(path)[0], *shapes[path], _split(path)[1]))  # fmt: skip
    bits = sorted({b for *_, b in given}, reverse=True)
    counts = np.zeros((len(levels), len(paths), len(bits)), np.uint8)
    for of_adapter, adapter in zip(counts, levels):
        for row, path in zip(of_adapter, paths):
            for n, b in adapter.get(path, ()):
                if n:
                    row[bits.index(b)] = n
    modules = tuple((path, *shapes[path]) for path in paths)
    return Index(tuple(names), base, modules, tuple(bits), counts)


def index_of(adapters: Sequence[Compressed]) -> Index:
    """Make the index of quantized adapters, as `write_compact` writes it.

    Raises:
        PackError: the adapters differ in shapes.
    """
    shapes: dict[str, tuple[int, int]] = {}
    levels, names, bases = [], [], []
    for adapter in adapters:  # once, since each may be read from a file
        for path, (level, *_) in adapter.modules.items():
            shape = level.a.width, level.b.width
            if shapes.setdefault(path, shape) != shape:
                raise PackError(
                    f"{adapter.name}: {path}: found {shape} inputs and outputs, expected"
                    f" {shapes[path]} as in others; a pack has one base model"
                )
        levels.append({p: [(x.rank, x.bits) for x in xs] for p, xs in adapter.modules.items()})
        names.append(adapter.name)
        bases.append(adapter.base)
    return make_index(names, next(filter(None, bases), None), levels, shapes)


def compact_nbytes(index: Index) -> int:
    """Exact size in bytes of the file that this index describes, header included."""
    return max(stop for _, stop in layout(index)[1].values())


def layout(index: Index) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The beginning of a file (length and JSON header), and where each tensor begins and ends.

    The header is padded to a multiple of 8 bytes. It is written here because the safetensors
    package does not fix the order of metadata, and the same adapters must give the same bytes.
    """
    runs = []
    for kind, members in groupby(index.modules, lambda module: (_split(module[0])[0], *module[1:])):
        layers = [_split(path)[1] for path, *_ in members]
        # In a span without a gap all layers are as far from their positions.
        spans = groupby(enumerate(layers), lambda place: place[1] - place[0])
        ends = [(span[0][1], span[-1][1]) for span in ([*group] for _, group in spans)]
        words = [f"{low}-{high}" if high > low else f"{low}" for low, high in ends if low >= 0]
        runs.append([*kind, ",".join(words)])
    about = {
        "base": index.base, "names": index.names, "bits": index.bits, "group_size": GROUP_SIZE,
        "modules": runs,
    }  # fmt: skip
    metadata = {"format": FORMAT, "version": VERSION, "index": _dump(about)}
    content: dict[str, Any] = {"__metadata__": metadata}
    places, stop = {}, 0
    for name, (dtype, shape) in index.tensors().items():
        start, stop = stop, stop + math.prod(shape) * _DTYPES[dtype]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        places[name] = start, stop
    text = _dump(content).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    size = len(header)
    return header, {name: (size + start, size + stop) for name, (start, stop) in places.items()}


_dump = partial(json.dumps, separators=(",", ":"), ensure_ascii=False)


def _split(path: str) -> tuple[str, int]:
    """`model.layers.3.mlp.up_proj` -> (`model.layers.*.mlp.up_proj`, 3); -1 without a layer."""
    match = _LAYER.fullmatch(path)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match else (path, -1)


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


def write_compact(path: Path, adapters: Sequence[Compressed]) -> Index:
    """Write adapters into one file; the same adapters give the same bytes.

    Their `sources` are not kept. The caller makes the write atomic (`utils.files.write_dir`).

    Returns:
        The index of the file, as `index_of` gives it.

    Raises:
        PackError: as `index_of`.
    """
    index = index_of(adapters)
    header, places = layout(index)
    # Where the next rows of each tensor go: one adapter after the other, so one is in memory.
    ends = {name: start for name, (start, _) in places.items()}
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(max(stop for _, stop in places.values()))
        file.seek(ends["counts"])
        file.write(index.counts.tobytes())
        for adapter in adapters:
            levels = [x for path, *_ in index.modules for x in adapter.modules.get(path, ())]
            for factor in (factor for level in levels for factor in (level.a, level.b)):
                for name, field in zip(_names(factor.bits, factor.width), _FIELDS):
                    file.seek(ends[name])
                    ends[name] += file.write(getattr(factor, field).tobytes())
    return index


def read_index(path: Path) -> Index:
    """Read the index and check every tensor's dtype and shape against it; no rows are read.

    Raises:
        PackError: the file is truncated, corrupt, or of another format or version.
    """
    with open_tensors(path, PackError) as file:
        form, version = file.metadata.get("format"), file.metadata.get("version")
        if (form, version) != (FORMAT, VERSION):
            raise PackError(
                f"{path}: format {form!r} version {version!r}, expected {FORMAT!r} version"
                f" {VERSION}; read it with the d2c-mlx that wrote it"
            )
        try:
            about = parse_json(file.metadata["index"])
            counts = file.handle.get_tensor("counts")
            modules = expand_modules(about["modules"], counts.shape[1])
            names, bits = tuple(about["names"]), tuple(about["bits"])
            index = Index(names, about["base"], modules, bits, counts)
            shape = len(names), len(modules), len(bits)
            good = counts.dtype == np.uint8 and counts.shape == shape
            good &= [*bits] == [width for width in BITS if width in bits]
            good &= about["group_size"] == GROUP_SIZE
            good = good and file.header == index.tensors()
        except (ArithmeticError, AttributeError, LookupError, SafetensorError, TypeError,
                ValueError):  # fmt: skip
            good = False
    if not good:
        raise PackError(f"{path}: its tensors are not those of its index; write the pack again")
    # A plain adapter would have gigabytes: a few wide rows, padded to another module's rank.
    rank = int(np.max(counts.sum(axis=2, dtype=np.int64), initial=0))
    widest = max((max(sides) for _, *sides in modules), default=0)
    if rank * widest > _MOST_NUMBERS:
        raise PackError(
            f"{path}: found rank {rank} and a module of {widest} features, expected at most"
            f" {_MOST_NUMBERS:,} numbers in a factor; no model has that"
        )
    return index


def read_compact(path: Path, adapter: int) -> Compressed:
    """Read one adapter of a file; rows of the others are not read.

    Args:
        path: a file that `write_compact` wrote.
        adapter: position in the file.

    Returns:
        The adapter in low-bit factors; `Compressed.adapter` gives it in 16 bit.

    Raises:
        PackError: the file is truncated, corrupt, of another version, or has no such adapter.
    """
    index, stacks = read_index(path), {}
    if not 0 <= adapter < len(index.names):
        raise PackError(f"{path}: no adapter {adapter}; it holds {len(index.names)}")
    with open_tensors(path, PackError) as file:
        for (bits, width), rows in index.rows().items():
            start, stop = (int(rows[:end].sum()) for end in (adapter, adapter + 1))
            if start < stop:  # safetensors refuses an empty slice at the end
                names = _names(bits, width)
                stacks[bits, width] = [file.handle.get_slice(x)[start:stop] for x in names]
    if not all(np.isfinite(x).all() for stack in stacks.values() for x in stack if x.dtype != "u4"):
        raise PackError(f"{path}: adapter {adapter} holds NaN or infinity; write the pack again")

    def take(n: int, bits: int, width: int) -> Quantized:
        """The next n rows of a stack."""
        stack = stacks[bits, width]
        stacks[bits, width] = [x[n:] for x in stack]
        weight, *rest = (x[:n] for x in stack)
        scales, biases = rest or [weight[:, :0]] * 2
        return Quantized(weight, scales, biases, bits, GROUP_SIZE, width)

    modules = {}
    for (module, width, out), counts in zip(index.modules, index.counts[adapter]):
        levels = [(int(n), bits) for n, bits in zip(counts, index.bits) if n]
        if levels:
            modules[module] = tuple(
                Level(take(n, bits, width), take(n, bits, out)) for n, bits in levels
            )
    return Compressed(index.names[adapter], modules, index.base)
