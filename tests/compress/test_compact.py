"""The compact file: round trip, exact size, readable by safetensors, bad files refused."""

import json
import struct

import numpy as np
import pytest
from helpers.loras import adapters_of, numeric
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d2c_mlx.compress.compact_file import (
    compact_nbytes,
    index_of,
    make_index,
    read_compact,
    write_compact,
)
from d2c_mlx.compress.compressed import BITS, Compressed
from d2c_mlx.compress.quantize import compress
from d2c_mlx.utils.errors import PackError

Q, V, LATE, HEAD = "m.layers.0.attn.q", "m.layers.0.attn.v", "m.layers.11.attn.q", "head"


def library(seed, n):
    """Compressed adapters with any mix of modules, ranks and levels, and one that lost all."""
    rng = np.random.default_rng(seed)
    dims, adapters = rng.integers(1, 140, 4), []
    shapes = {Q: dims[:2], LATE: dims[:2], V: (dims[0], dims[2]), HEAD: (dims[3], dims[3])}
    for adapter in adapters_of(rng, n, shapes):
        levels = {}
        for path in adapter.modules:
            bits = sorted(rng.choice(BITS, rng.integers(0, 3), replace=False), reverse=True)
            levels[path] = [(int(rng.integers(1, 4)), int(b)) for b in bits]
        adapters.append(compress(adapter, levels))
    return [*adapters, Compressed("empty", {}, "base")]


def parts_of(adapter, paths):
    """Every factor in the order of the file."""
    levels = [level for path in paths for level in adapter.modules.get(path, ())]
    return [part for level in levels for part in (level.a, level.b)]


@numeric(st.integers(0, 2**16), st.integers(1, 4), n=30)
def test_round_trip_size_and_layout(tmp_path_factory, seed, n):
    """One tensor per bits and width; rows by adapter, then module, a before b."""
    path, adapters = tmp_path_factory.mktemp("compact") / "x.safetensors", library(seed, n)
    index = write_compact(path, adapters)
    content, paths = path.read_bytes(), [module for module, *_ in index.modules]
    write_compact(path, library(seed, n))
    assert path.read_bytes() == content and len(content) == compact_nbytes(index_of(adapters))
    # The size is known from bit allocations alone.
    levels = [{p: [(0, 4), *((x.rank, x.bits) for x in ls)] for p, ls in a.modules.items()}
              for a in adapters]  # fmt: skip
    shapes = {p: (x[0].a.width, x[0].b.width) for a in adapters for p, x in a.modules.items()}
    names = [adapter.name for adapter in adapters]
    assert compact_nbytes(make_index(names, "base", levels, shapes)) == len(content)
    tensors = load_file(path)
    assert tensors["counts"].shape == (n + 1, len(paths), len(index.bits))
    seen = dict.fromkeys(tensors, 0)
    for k, adapter in enumerate(adapters):
        again = read_compact(path, k)
        assert (again.name, again.base) == (adapter.name, adapter.base)
        assert again.modules.keys() == adapter.modules.keys()
        for part, other in zip(parts_of(adapter, paths), parts_of(again, paths), strict=True):
            assert (part.bits, part.width) == (other.bits, other.width)
            for field in ("weight", "scales", "biases")[: 1 if part.bits == 16 else 3]:
                name, rows = f"{part.bits}bit.{part.width}.{field}", getattr(part, field)
                start, seen[name] = seen[name], seen[name] + len(rows)
                for x in (tensors[name][start : seen[name]], getattr(other, field)):
                    assert x.dtype == rows.dtype and np.array_equal(x, rows)
    assert all(len(tensors[name]) == stop for name, stop in seen.items() if name != "counts")
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["index"])
    assert about["names"] == names and about["base"] == "base"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "compact.safetensors"
    write_compact(path, library(4, 2))
    return path


def refused(path, adapter=0):
    with pytest.raises(PackError) as caught:
        read_compact(path, adapter)
    (line,) = caught.value.problems
    assert str(path) in line
    return line


def rewrite(path, **changes):
    """Change the metadata of the file's header."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_truncated_anywhere_missing_or_of_another_version(file):
    content = file.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert "copy it again" in refused(file)
    file.write_bytes(content)
    for adapter in (-1, 3):
        assert f"no adapter {adapter}; it holds 3" in refused(file, adapter)
    rewrite(file, version="2")
    assert "version '2', expected 'd2c-mlx-compact' version 1" in refused(file)
    save_file({"x": np.zeros(3)}, file)
    assert "format None" in refused(file)
    file.unlink()
    assert "missing" in refused(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(names=["only one"]),
        lambda index: index.update(bits=[7]),
        lambda index: index.update(group_size=128),
        lambda index: index.pop("modules"),
        lambda index: index["modules"][0].__setitem__(1, 3000),
        lambda index: index["modules"][0].__setitem__(3, "x"),
        "[]", "{",
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_tensors(file, change):
    with safe_open(file, framework="numpy") as opened:
        index = json.loads(opened.metadata()["index"])
    if callable(change):
        change(index)
    rewrite(file, index=json.dumps(index) if callable(change) else change)
    assert "write the pack again" in refused(file)


def test_counts_and_numbers_that_are_none(file):
    content = bytearray(file.read_bytes())
    tensors = load_file(file)
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata()
    file.write_bytes(content[:-2] + bytes(x ^ 3 for x in content[-2:]))
    assert "write the pack again" in refused(file)
    scales = {name: np.full_like(x, np.nan) for name, x in tensors.items() if "scales" in name}
    save_file(tensors | scales, file, metadata=about)
    assert "NaN" in refused(file)


def test_adapters_that_do_not_go_together():
    first, other = library(5, 1)[0], library(6, 1)[0]
    levels = next(iter(other.modules.values()))
    odd = Compressed("odd", {next(iter(first.modules)): levels})
    with pytest.raises(PackError, match="a pack has one base model"):
        index_of([first, odd])
    with pytest.raises(OverflowError):
        make_index(["a"], None, [{Q: [(256, 4)]}], {Q: (300, 300)})
