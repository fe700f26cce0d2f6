"""The compact file: round trip, exact size, readable by safetensors, bad files refused."""

import json
import struct

import numpy as np
import pytest
from helpers.loras import NUMERIC, adapters_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d2c_mlx.compress.compact_file import (
    compact_nbytes,
    expand_modules,
    index_of,
    make_index,
    read_compact,
    read_index,
    write_compact,
)
from d2c_mlx.compress.compressed import BITS, Compressed
from d2c_mlx.compress.quantize import compress
from d2c_mlx.utils.errors import PackError

FEW = settings(NUMERIC, max_examples=30)
Q, V, LATE, HEAD = "m.layers.0.attn.q", "m.layers.0.attn.v", "m.layers.11.attn.q", "head"


def library(seed, n, max_rank=4, empty=False):
    """Compressed adapters with any mix of modules, ranks and levels."""
    rng = np.random.default_rng(seed)
    dims = rng.integers(1, 140, 4)
    shapes = {Q: dims[:2], LATE: dims[:2], V: (dims[0], dims[2]), HEAD: (dims[3], dims[3])}
    found = []
    for adapter in adapters_of(rng, n, shapes, max_rank):
        levels = {}
        for path in adapter.modules:
            bits = sorted(rng.choice(BITS, rng.integers(0, 3), replace=False), reverse=True)
            levels[path] = [(int(rng.integers(1, 4)), int(b)) for b in bits]
        found.append(compress(adapter, levels))
    return [*found, Compressed("empty", {}, "base")] if empty else found


def same(one, other):
    """Everything but the sources, which a file does not keep."""
    assert (one.name, one.base, list(one.modules)) == (
        other.name,
        other.base,
        sorted(other.modules, key=list(one.modules).index),
    )
    assert set(one.modules) == set(other.modules)
    for path, levels in one.modules.items():
        assert len(levels) == len(other.modules[path])
        for x, y in zip(levels, other.modules[path]):
            for p, q in ((x.a, y.a), (x.b, y.b)):
                assert (p.bits, p.group_size, p.width) == (q.bits, q.group_size, q.width)
                for name in ("weight", "scales", "biases"):
                    u, v = getattr(p, name), getattr(q, name)
                    assert u.dtype == v.dtype and u.shape == v.shape and np.array_equal(u, v)


cases = st.tuples(st.integers(0, 2**16), st.integers(1, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compact")


@FEW
@given(cases, st.booleans())
def test_round_trip_and_exact_size(folder, case, empty):
    adapters = library(*case, empty=empty)
    path = folder / "any.safetensors"
    index = write_compact(path, adapters)
    assert path.stat().st_size == compact_nbytes(index) == compact_nbytes(index_of(adapters))
    for k, adapter in enumerate(adapters):
        same(read_compact(path, k), adapter)
    again = read_index(path)
    assert (again.names, again.base, again.modules, again.bits) == (
        index.names, index.base, index.modules, index.bits,
    )  # fmt: skip
    assert np.array_equal(again.counts, index.counts)


@FEW
@given(cases)
def test_other_adapters_do_not_matter(folder, case):
    adapters = library(*case)
    write_compact(folder / "all.safetensors", adapters)
    write_compact(folder / "last.safetensors", adapters[-1:])
    one = read_compact(folder / "all.safetensors", len(adapters) - 1)
    same(one, read_compact(folder / "last.safetensors", 0))


def test_sizes_are_known_from_counts_alone(folder):
    adapters = library(1, 3)
    levels = [
        {path: [(0, 4), *((x.rank, x.bits) for x in ls)] for path, ls in a.modules.items()}
        for a in adapters
    ]
    shapes = {p: (x[0].a.width, x[0].b.width) for a in adapters for p, x in a.modules.items()}
    index = make_index([a.name for a in adapters], "base", levels, shapes)
    write_compact(folder / "known.safetensors", adapters)
    assert (folder / "known.safetensors").stat().st_size == compact_nbytes(index)


def test_the_same_adapters_are_the_same_bytes(folder):
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    write_compact(one, library(2, 3))
    write_compact(two, library(2, 3))
    assert one.read_bytes() == two.read_bytes()


def test_the_safetensors_package_reads_it_as_documented(folder):
    """One tensor per bits and width; rows by adapter, then module, a before b."""
    adapters = library(3, 3)
    path = folder / "plain.safetensors"
    index = write_compact(path, adapters)
    tensors = load_file(path)
    assert tensors["counts"].shape == (3, len(index.modules), len(index.bits))
    seen = dict.fromkeys(tensors, 0)
    for adapter in adapters:
        for module, *_ in index.modules:
            for level in adapter.modules.get(module, ()):
                for part in (level.a, level.b):
                    for field in ("weight", "scales", "biases")[: 1 if part.bits == 16 else 3]:
                        name, rows = f"{part.bits}bit.{part.width}.{field}", getattr(part, field)
                        start = seen[name]
                        seen[name] = stop = start + len(rows)
                        assert np.array_equal(tensors[name][start:stop], rows)
    assert all(len(tensors[name]) == n for name, n in seen.items() if name != "counts")
    with safe_open(path, framework="numpy") as file:
        said = json.loads(file.metadata()["index"])
    assert said["names"] == ["t0", "t1", "t2"] and said["base"] == "base"


def test_many_layers_take_one_line():
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in (*range(30), 40)]
    levels = [{path: [(1, 2)] for path in paths}]
    index = make_index(["a"], None, levels, dict.fromkeys(paths, (8, 8)))
    assert [path for path, *_ in index.modules] == paths
    pattern = ["model.layers.*.self_attn.q_proj", 8, 8, "0-29,40"]
    assert expand_modules([pattern], 99) == index.modules
    # 62 factors: their own tensors would take 6 KB of header.
    assert compact_nbytes(index) < 62 * (2 + 2 + 4 * 4) + 700


def test_no_module_at_all(folder):
    path = folder / "none.safetensors"
    index = write_compact(path, [Compressed("a", {}), Compressed("b", {})])
    assert path.stat().st_size == compact_nbytes(index)
    assert read_compact(path, 1).adapter() is None


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


def rewritten(path, change):
    """The file with its header (a dict) changed."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_truncated_anywhere(file):
    content = file.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert "copy it again" in refused(file)
    file.unlink()
    assert "missing" in refused(file)


def test_another_format_or_version(file):
    rewritten(file, lambda header: header["__metadata__"].update(version="2"))
    assert "version '2', expected 'd2c-mlx-compact' version 1" in refused(file)
    save_file({"x": np.zeros(3)}, file)
    assert "format None" in refused(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(names=["only one"]),
        lambda index: index.update(names=None),
        lambda index: index.update(bits=[7]),
        lambda index: index.update(group_size=48),
        lambda index: index.update(group_size=128),
        lambda index: index.pop("modules"),
        lambda index: index["modules"][0].__setitem__(1, 3000),
        lambda index: index["modules"][0].__setitem__(3, "x"),
        lambda index: index.clear(),
        "", "[]", "3", "{",
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_tensors(file, change):
    def edit(header):
        index = json.loads(header["__metadata__"]["index"])
        if callable(change):
            change(index)
        text = json.dumps(index) if callable(change) else change
        header["__metadata__"]["index"] = text

    rewritten(file, edit)
    assert "write the pack again" in refused(file)


def test_counts_that_do_not_add_up(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 3
    content[-2] ^= 3
    file.write_bytes(content)
    assert "write the pack again" in refused(file)


def test_numbers_that_are_not_finite(file):
    tensors = load_file(file)
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata()
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file, metadata=about)
    assert "NaN" in refused(file)


@pytest.mark.parametrize("adapter", [-1, 2])
def test_no_such_adapter(file, adapter):
    assert f"no adapter {adapter}; it holds 2" in refused(file, adapter)


def test_adapters_that_do_not_go_together(tmp_path):
    one, other = library(5, 1)[0], library(6, 1)[0]
    shared = next(iter(one.modules))
    odd = Compressed("odd", {shared: next(iter(other.modules.values()))})
    with pytest.raises(PackError, match="a pack has one base model"):
        index_of([one, odd])
    with pytest.raises(OverflowError):
        make_index(["a"], None, [{Q: [(256, 4)]}], {Q: (300, 300)})
