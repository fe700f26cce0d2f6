"""Writing and reading many low-bit adapters in one safetensors file.

A safetensors header takes about 100 bytes per tensor. For the 240 factors of one adapter that is
more than its numbers at 2 bit. So rows are stacked over adapters, modules and factors, one tensor
per bit width and row width. `file_layout.py` defines the layout, docs/reference/formats.md
explains it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from d2c_mlx.adapters.tensor_file import TensorFile, open_tensors
from d2c_mlx.compress.compressed import BITS, GROUP_SIZES, Compressed, Level, Quantized
from d2c_mlx.compress.file_layout import (
    DTYPES,
    FIELDS,
    FORMAT,
    VERSION,
    Index,
    expand_modules,
    header_bytes,
    make_index,
    tensor_name,
)
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.parsing import parse_json

__all__ = ["index_of", "read_compact", "read_index", "write_compact"]

# Most numbers of one factor in 16 bit; a vocabulary of 262,144 at rank 1,024 has as many.
_MOST_NUMBERS = 1 << 28


def index_of(adapters: Sequence[Compressed]) -> Index:
    """Make the index of quantized adapters, as `write_compact` writes it.

    Use it with `compact_nbytes` to know a file's size; `make_index` needs only counts.

    Raises:
        PackError: the adapters differ in shapes or group sizes.
    """
    shapes: dict[str, tuple[int, int]] = {}
    counts, names, bases, sizes = [], [], [], set()
    for adapter in adapters:  # once, since each may be read from a file
        for path, levels in adapter.modules.items():
            shape = (levels[0].a.width, levels[0].b.width)
            if shapes.setdefault(path, shape) != shape:
                raise PackError(
                    f"{adapter.name}: {path}: found in, out = {shape}, others have {shapes[path]};"
                    " a pack has one base model"
                )
        if adapter.modules:
            sizes.add(adapter.group_size)
        bits = {
            path: {one.bits: one.rank for one in some} for path, some in adapter.modules.items()
        }
        counts.append(bits)
        names.append(adapter.name)
        bases.append(adapter.base)
    if len(sizes) > 1:
        raise PackError(
            f"group sizes {sorted(sizes)}: one pack has one; quantize all adapters alike"
        )
    base = next((one for one in bases if one), None)
    size = sizes.pop() if sizes else GROUP_SIZES[1]
    return make_index(names, base, counts, shapes, size)


def write_compact(path: Path, adapters: Sequence[Compressed]) -> Index:
    """Write adapters into one file; the same adapters give the same bytes.

    Their `sources` are not kept. The caller makes the write atomic (`utils.files.write_dir`).

    Returns:
        The index of the file, as `index_of` gives it.

    Raises:
        PackError: as `index_of`.
    """
    index = index_of(adapters)
    header = header_bytes(index)
    # Where the next rows of each tensor go: one adapter after the other, so one is in memory.
    dtypes, places, end = {}, {}, len(header)
    for name, (kind, shape) in index.tensors().items():
        dtypes[name], places[name] = np.dtype(DTYPES[kind]), end
        end += math.prod(shape) * dtypes[name].itemsize
    with open(path, "wb") as file:

        def add(name: str, rows: np.ndarray) -> None:
            file.seek(places[name])
            places[name] += file.write(rows.astype(dtypes[name]).tobytes())

        file.write(header)
        file.truncate(end)
        add("counts", index.counts)
        for adapter in adapters:
            for name, parts in _rows_of(adapter, index).items():
                add(name, np.concatenate(parts))
    return index


def _rows_of(adapter: Compressed, index: Index) -> dict[str, list[np.ndarray]]:
    """Tensor name -> the adapter's rows, in the file's order."""
    found: dict[str, list[np.ndarray]] = {}
    for module, *_ in index.modules:
        for level in adapter.modules.get(module, ()):
            for factor in (level.a, level.b):
                for field in FIELDS[: 1 if factor.bits == 16 else 3]:
                    name = tensor_name(factor.bits, factor.width, field)
                    found.setdefault(name, []).append(getattr(factor, field))
    return found


def read_index(path: Path) -> Index:
    """Read the index and check every tensor's dtype and shape against it; no rows are read.

    Raises:
        PackError: the file is truncated, corrupt, or of another format or version.
    """
    with open_tensors(path, PackError) as file:
        return _index(path, file)


def _index(path: Path, file: TensorFile) -> Index:
    about = file.metadata
    found = about.get("format"), about.get("version")
    if found != (FORMAT, VERSION):
        raise PackError(
            f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version"
            f" {VERSION}; read it with the d2c-mlx that wrote it"
        )
    try:
        said = parse_json(about["index"])
        counts = file.handle.get_tensor("counts")
        index = Index(
            tuple(said["names"]),
            said["base"],
            expand_modules(said["modules"], counts.shape[1]),
            tuple(said["bits"]),
            said["group_size"],
            counts,
        )
        size = len(index.names), len(index.modules), len(index.bits)
        same = index.counts.dtype == np.uint8 and index.counts.shape == size
        same &= [*index.bits] == [bits for bits in BITS if bits in index.bits]
        same &= index.group_size in GROUP_SIZES
        if same and file.header == index.tensors():
            _check_size(path, index)
            return index
    except (ArithmeticError, AttributeError, LookupError, SafetensorError, TypeError, ValueError):
        pass
    raise PackError(f"{path}: its tensors are not those that its index lists; write the pack again")


def _check_size(path: Path, index: Index) -> None:
    """Refuse a plain adapter of gigabytes: a few wide rows, padded to another module's rank."""
    rank = int(np.max(index.counts.sum(axis=2, dtype=np.int64), initial=0))
    widest = max((max(sides) for _, *sides in index.modules), default=0)
    if rank * widest > _MOST_NUMBERS:
        raise PackError(
            f"{path}: found rank {rank} and a module of {widest} features, expected at most"
            f" {_MOST_NUMBERS:,} numbers in a factor; no model has that"
        )


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
    with open_tensors(path, PackError) as file:
        index = _index(path, file)
        if not 0 <= adapter < len(index.names):
            raise PackError(f"{path}: no adapter {adapter}; it holds {len(index.names)}")
        stacks = {}
        for (bits, width), rows in index.rows().items():
            if not rows[adapter]:
                continue  # safetensors refuses an empty slice at the end
            start = int(rows[:adapter].sum())
            stop = start + int(rows[adapter])
            stacks[bits, width] = [
                file.handle.get_slice(tensor_name(bits, width, field))[start:stop]
                for field in FIELDS[: 1 if bits == 16 else 3]
            ]
    return Compressed(
        index.names[adapter], _cut(path, index, adapter, stacks), index.group_size, index.base
    )


def _cut(
    path: Path, index: Index, adapter: int, stacks: Mapping[tuple[int, int], list[np.ndarray]]
) -> dict[str, tuple[Level, ...]]:
    """Cut the rows of one adapter into the levels of its modules."""
    if not all(np.isfinite(x).all() for stack in stacks.values() for x in stack if x.dtype != "u4"):
        raise PackError(f"{path}: adapter {adapter} holds NaN or infinity; write the pack again")
    taken = dict.fromkeys(stacks, 0)

    def take(n: int, bits: int, width: int) -> Quantized:
        start = taken[bits, width]
        taken[bits, width] = stop = start + n
        weight, *rest = (x[start:stop] for x in stacks[bits, width])
        scales, biases = rest or [np.zeros((n, 0), np.float16)] * 2
        return Quantized(weight, scales, biases, bits, index.group_size, width)

    modules = {}
    for (module, width, out), counts in zip(index.modules, index.counts[adapter]):
        levels = [(int(n), bits) for n, bits in zip(counts, index.bits) if n]
        if levels:
            modules[module] = tuple(
                Level(take(n, bits, width), take(n, bits, out)) for n, bits in levels
            )
    return modules
