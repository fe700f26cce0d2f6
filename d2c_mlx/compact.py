"""Many low-bit adapters in one safetensors file.

A safetensors header takes about 100 bytes per tensor: for 240 factors of one adapter that is more
than its numbers at 2 bit. So rows are stacked over adapters, modules and factors: one tensor per
bits and row width. docs/packs.md has the layout.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from d2c_mlx.errors import PackError
from d2c_mlx.quantize import Compressed, Level
from d2c_mlx.rounding import BITS, GROUP_SIZES, Quantized, columns

__all__ = [
    "Index",
    "compact_nbytes",
    "index_of",
    "make_index",
    "read_compact",
    "read_index",
    "write_compact",
]

FORMAT, VERSION = "d2c-mlx-compact", "1"
_DTYPES = {"U32": np.dtype("<u4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}
_LAYER = re.compile(r"(.*?\.)(0|[1-9][0-9]*)(\..*)")
_FIELDS = ("weight", "scales", "biases")


@dataclass(frozen=True, eq=False)
class Index:
    """Whose rows are where. Everything but the rows themselves.

    Attributes:
        names: of the adapters.
        base: the base model's name.
        modules: `(path, in, out)` of every module that some adapter has, in the file's order.
        bits: that some module uses, falling.
        group_size: of all rows.
        counts: uint8 `(n_adapters, n_modules, n_bits)`, components at each bits.
    """

    names: tuple[str, ...]
    base: str | None
    modules: tuple[tuple[str, int, int], ...]
    bits: tuple[int, ...]
    group_size: int
    counts: np.ndarray

    def rows(self) -> dict[tuple[int, int], np.ndarray]:
        """(bits, row width) -> rows of every adapter, `(n_adapters,)`; the tensors of the file."""
        found = {}
        widths = sorted({width for _, *shape in self.modules for width in shape})
        for width in widths:
            uses = np.array([shape.count(width) for _, *shape in self.modules])
            for level, bits in enumerate(self.bits):
                rows = self.counts[:, :, level].astype(np.int64) @ uses
                if rows.any():
                    found[bits, width] = rows
        return dict(sorted(found.items(), reverse=True))

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape), in the file's order: wide types first."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {"counts": ("U8", self.counts.shape)}
        for (bits, width), rows in self.rows().items():
            words, groups = columns(width, bits, self.group_size)
            n = int(rows.sum())
            found[_name(bits, width, "weight")] = ("F16" if bits == 16 else "U32", (n, words))
            if groups:
                found |= {_name(bits, width, f): ("F16", (n, groups)) for f in _FIELDS[1:]}
        return dict(sorted(found.items(), key=lambda item: list(_DTYPES).index(item[1][0])))


def _name(bits: int, width: int, field: str) -> str:
    return f"{bits}bit.{width}.{field}"


def make_index(
    names: Sequence[str],
    base: str | None,
    counts: Sequence[Mapping[str, Mapping[int, int]]],
    shapes: Mapping[str, tuple[int, int]],
    group_size: int,
) -> Index:
    """The index of adapters of which only the sizes are known yet.

    Args:
        names: of the adapters.
        base: the base model's name.
        counts: per adapter, module path -> bits -> number of components.
        shapes: module path -> (in, out), of at least those modules.
        group_size: one of `rounding.GROUP_SIZES`.

    Raises:
        PackError: more than 255 components of a module at the same bits.
    """
    paths = {path for one in counts for path in one}
    modules = tuple((path, *shapes[path]) for path in paths)
    modules = tuple(sorted(modules, key=lambda m: (_split(m[0])[0], m[1:], _split(m[0])[1])))
    bits = sorted({b for one in counts for levels in one.values() for b in levels}, reverse=True)
    table = np.array(
        [[[one.get(path, {}).get(b, 0) for b in bits] for path, *_ in modules] for one in counts],
        np.int64,
    ).reshape(len(counts), len(modules), len(bits))
    if table.max(initial=0) > 255:
        raise PackError(f"{table.max()} components of one module at the same bits; 255 fit")
    return Index(tuple(names), base, modules, tuple(bits), group_size, table.astype(np.uint8))


def index_of(adapters: Sequence[Compressed]) -> Index:
    """The index of adapters as `write_compact` writes it.

    Raises:
        PackError: adapters of different shapes or group sizes.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for path, levels in adapter.modules.items():
            shape = (levels[0].a.width, levels[0].b.width)
            if shapes.setdefault(path, shape) != shape:
                raise PackError(
                    f"{adapter.name}: {path}: found in, out = {shape}, others have {shapes[path]};"
                    " a pack has one base model"
                )
    sizes = sorted({adapter.group_size for adapter in adapters if adapter.modules})
    if len(sizes) > 1:
        raise PackError(f"group sizes {sizes}: one pack has one; quantize all adapters alike")
    counts = [
        {path: {level.bits: level.rank for level in levels} for path, levels in a.modules.items()}
        for a in adapters
    ]
    base = next((adapter.base for adapter in adapters if adapter.base), None)
    names = [adapter.name for adapter in adapters]
    return make_index(names, base, counts, shapes, sizes[0] if sizes else GROUP_SIZES[1])


def compact_nbytes(index: Index) -> int:
    """Exact size in bytes of the file that holds what `index` says, header included."""
    tensors = index.tensors().values()
    return len(_header(index)) + sum(_nbytes(dtype, shape) for dtype, shape in tensors)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize


def write_compact(path: Path, adapters: Sequence[Compressed]) -> Index:
    """Write one file; the caller makes it atomic (`files.write_dir`). Sources are not kept.

    The same adapters give the same bytes: the header is written here because the safetensors
    package does not fix the order of metadata.
    """
    index = index_of(adapters)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in index.tensors()}
    parts["counts"].append(index.counts)
    for adapter in adapters:
        for module, *_ in index.modules:
            for level in adapter.modules.get(module, ()):
                for factor in (level.a, level.b):
                    for field in _FIELDS[: 1 if factor.bits == 16 else 3]:
                        rows = getattr(factor, field)
                        parts[_name(factor.bits, factor.width, field)].append(rows)
    with open(path, "wb") as file:
        file.write(_header(index))
        for name, (dtype, _) in index.tensors().items():
            file.write(np.concatenate(parts[name]).astype(_DTYPES[dtype]).tobytes())
    return index


def _header(index: Index) -> bytes:
    """Length and JSON header of a safetensors file, padded to a multiple of 8."""
    about = {
        "base": index.base,
        "names": index.names,
        "bits": index.bits,
        "group_size": index.group_size,
        "modules": _folded(index.modules),
    }
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "version": VERSION, "index": _dump(about)}
    }
    start = 0
    for name, (dtype, shape) in index.tensors().items():
        stop = start + _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = _dump(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _split(path: str) -> tuple[str, int]:
    """`model.layers.3.mlp.up_proj` -> (`model.layers.*.mlp.up_proj`, 3); -1 without a layer."""
    match = _LAYER.fullmatch(path)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match else (path, -1)


def _folded(modules: Sequence[tuple[str, int, int]]) -> list[list[Any]]:
    """`[pattern, in, out, "0-15,17"]` per module of a block: 20 times shorter than paths."""
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


def _unfolded(runs: Sequence[Sequence[Any]]) -> tuple[tuple[str, int, int], ...]:
    modules = []
    for pattern, width, out, spans in runs:
        for span in spans.split(","):
            low, _, high = span.partition("-")
            layers = range(int(low), int(high or low) + 1) if span else (-1,)
            for layer in layers:
                path = pattern if layer < 0 else pattern.replace("*", str(layer))
                modules.append((path, int(width), int(out)))
    return tuple(modules)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise PackError(
            f"{path}: missing, truncated or not a safetensors file ({reason}); copy it again"
        ) from None


def read_index(path: Path) -> Index:
    """Read the index and check every tensor's type and shape against it; no rows are read.

    Raises:
        PackError: truncated, corrupt, or another format or version.
    """
    with _opened(path) as file:
        return _index(path, file)


def _index(path: Path, file: Any) -> Index:  # noqa: ANN401  safe_open has no type
    about = file.metadata() or {}
    found = about.get("format"), about.get("version")
    if found != (FORMAT, VERSION):
        raise PackError(
            f"{path}: format {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version"
            f" {VERSION}; read it with the d2c-mlx that wrote it"
        )
    try:
        said = json.loads(about["index"])
        index = Index(
            tuple(said["names"]),
            said["base"],
            _unfolded(said["modules"]),
            tuple(said["bits"]),
            said["group_size"],
            file.get_tensor("counts"),
        )
        size = len(index.names), len(index.modules), len(index.bits)
        same = index.counts.dtype == np.uint8 and index.counts.shape == size
        same &= set(index.bits) <= set(BITS) and index.group_size in GROUP_SIZES
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        actual = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        if same and actual == index.tensors():
            return index
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise PackError(f"{path}: its tensors are not those that its index lists; write the pack again")


def read_compact(path: Path, adapter: int) -> Compressed:
    """Read one adapter: its rows only.

    Args:
        path: what `write_compact` wrote.
        adapter: position in the file.

    Raises:
        PackError: truncated, corrupt, another version, or no such adapter.
    """
    with _opened(path) as file:
        index = _index(path, file)
        if not 0 <= adapter < len(index.names):
            raise PackError(f"{path}: no adapter {adapter}; it holds {len(index.names)}")
        stacks = {}
        for (bits, width), rows in index.rows().items():
            start = int(rows[:adapter].sum())
            stop = start + int(rows[adapter])
            stacks[bits, width] = [
                file.get_slice(_name(bits, width, field))[start:stop]
                for field in _FIELDS[: 1 if bits == 16 else 3]
            ]
    return Compressed(
        index.names[adapter], _cut(path, index, adapter, stacks), index.group_size, index.base
    )


def _cut(
    path: Path, index: Index, adapter: int, stacks: Mapping[tuple[int, int], list[np.ndarray]]
) -> dict[str, tuple[Level, ...]]:
    """Rows of one adapter -> levels of its modules."""
    if not all(np.isfinite(x).all() for stack in stacks.values() for x in stack if x.dtype != "u4"):
        raise PackError(f"{path}: adapter {adapter} holds NaN or infinity; write the pack again")
    used = dict.fromkeys(stacks, 0)

    def take(n: int, bits: int, width: int) -> Quantized:
        start = used[bits, width]
        used[bits, width] = stop = start + n
        parts = [x[start:stop] for x in stacks[bits, width]]
        if bits == 16:
            parts += [np.zeros((n, 0), np.float16)] * 2
        return Quantized(*parts, bits, index.group_size, width)

    modules = {}
    for (module, width, out), counts in zip(index.modules, index.counts[adapter]):
        levels = [(int(n), bits) for n, bits in zip(counts, index.bits) if n]
        if levels:
            modules[module] = tuple(
                Level(take(n, bits, width), take(n, bits, out)) for n, bits in levels
            )
    return modules
