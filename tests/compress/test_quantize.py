"""Low-bit factors against dequantization written out and nearest rounding; their file."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import adapters_of, dense, lora_of, numeric, plain
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compact_file import (
    compact_nbytes,
    index_of,
    make_index,
    read_compact,
    write_compact,
)
from d2c_mlx.compress.compressed import BITS, Compressed, dequantize, packed_columns
from d2c_mlx.compress.quantize import compress, gptq_round, svd_components
from d2c_mlx.utils.errors import PackError


def oracle(part):
    """The float16 numbers of a Quantized; code k is bits k * bits ... of a row."""
    if part.bits == 16:
        return part.weight
    rows, group = [], np.arange(part.width) // part.group_size
    for words, scales, biases in zip(part.weight, part.scales, part.biases):
        stream, last = int.from_bytes(words.tobytes(), "little"), 2**part.bits - 1
        codes = [stream >> k * part.bits & last for k in range(part.width)]
        scale, bias = (x.astype(np.float32)[group] for x in (scales, biases))
        rows.append((scale * np.array(codes, np.float32) + bias).astype(np.float16))
    return np.array(rows, np.float16).reshape(len(part.weight), part.width)


def factors_of(rng, shape, rank, decay=0.7):
    """Factors whose singular values fall as those of trained adapters do."""
    a = rng.normal(size=(shape[0], rank)) / np.sqrt(shape[0])
    b = rng.normal(size=(rank, shape[1])) / np.sqrt(shape[1]) * decay ** np.arange(rank)[:, None]
    return a.astype(np.float32), b.astype(np.float32)


def adapter_of(a, b):
    return Adapter("one", {"m": LoRA(mx.array(a), mx.array(b))})


def quantized(a, b, levels):
    """The levels of the only module of an adapter."""
    return compress(adapter_of(a, b), {"m": levels}).modules.get("m", ())


def error(a, b, levels):
    """Of what levels store, relative to dW in Frobenius norm."""
    exact = dense(LoRA(mx.array(a), mx.array(b)))
    return np.linalg.norm(dense(plain(levels)) - exact) / np.linalg.norm(exact)


def nearest_error(a, b, sizes):
    """The components in the codes of MLX's own `quantize`."""
    pair, places = svd_components(adapter_of(a, b))["m"], np.cumsum([0, *(n for n, _ in sizes)])
    factors = []
    for rows in pair:
        padded = mx.array(np.pad(rows, [(0, 0), (0, -rows.shape[1] % 64)]))
        levels = [padded[i:j] if bits == 16 else mx.dequantize(*mx.quantize(padded[i:j], 64, bits),
                                                              64, bits)
                  for i, j, (_, bits) in zip(places, places[1:], sizes)]  # fmt: skip
        whole = np.concatenate([*map(np.array, levels), padded[:0]])
        factors.append(whole[:, : rows.shape[1]])
    exact = a @ b
    return np.linalg.norm(factors[0].T @ factors[1] - exact) / np.linalg.norm(exact)


@st.composite
def level_lists(draw):
    bits = sorted(draw(st.sets(st.sampled_from(BITS), min_size=1, max_size=3)), reverse=True)
    return [(draw(st.integers(1, 5)), b) for b in bits]


sides = st.integers(1, 150)


@numeric(st.integers(0, 2**16), st.tuples(sides, sides), st.integers(1, 7), level_lists(), n=30)
def test_levels_are_what_was_asked_for_in_codes_no_worse_than_the_nearest(
    seed, shape, rank, levels
):
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    stored, left, sizes = quantized(a, b, levels), min(rank, *shape), []
    for n, bits in levels:
        sizes += [(min(n, left), bits)] * (left > 0)
        left -= n
    assert [(level.rank, level.bits) for level in stored] == sizes
    parts = [part for level in stored for part in (level.a, level.b)]
    for part, values in zip(parts, dequantize([[part] for part in parts])):
        assert np.array_equal(values, oracle(part))
        assert (part.weight.shape[1], part.scales.shape[1]) == packed_columns(part.width, part.bits)
    lora = plain(stored)
    assert lora.a.dtype == lora.b.dtype == mx.float16 and lora.scale == 1.0
    assert np.array_equal(lora.a.T, np.concatenate([oracle(level.a) for level in stored]))
    assert np.array_equal(lora.b, np.concatenate([oracle(level.b) for level in stored]))
    assert error(a, b, stored) <= 1.1 * nearest_error(a, b, sizes) + 1e-3


@pytest.mark.parametrize("bits, share", [(8, 0.8), (4, 0.75), (3, 0.75), (2, 0.75)])
def test_much_better_than_the_nearest_codes_on_what_adapters_look_like(bits, share):
    a, b = factors_of(np.random.default_rng(0), (256, 192), 8)
    ours = error(a, b, quantized(a, b, [(8, bits)]))
    assert ours < share * nearest_error(a, b, [(8, bits)])


def test_updates_of_zero_of_low_rank_and_of_a_spectrum_that_falls_fast():
    a, b = factors_of(np.random.default_rng(2), (64, 32), 4)
    assert quantized(a, 0 * b, [(4, 4)]) == quantized(a[:, :0], b[:0], [(4, 4)]) == ()
    twice = np.concatenate([a, a], axis=1), np.concatenate([b, b])
    (level,) = quantized(*twice, [(8, 4)])
    assert level.rank == 4
    a, b = factors_of(np.random.default_rng(4), (96, 96), 12, decay=0.1)
    for bits in BITS:
        assert error(a, b, quantized(a, b, [(12, bits)])) < 0.5


def test_modules_that_are_rounded_together_are_rounded_as_alone():
    """Any widths, ranks and levels, more modules than go at once."""
    rng, modules, levels = np.random.default_rng(7), {}, {}
    for i in range(40):
        shape, rank = (96, 64, 33)[i % 3], 1 + i % 7
        modules[f"m{i:02d}"] = lora_of(rng, (shape, (64, 100)[i % 2]), rank, 0.5)
        levels[f"m{i:02d}"] = ([(1, 16), (2, 4), (1, 3)], [(3, 8), (2, 2)], [(9, 3)], [])[i % 4]
    whole = Adapter("many", modules, "base", ("x", "y"))
    small = compress(whole, levels)
    again = small.adapter()
    assert list(small.modules) == [path for path in sorted(modules) if levels[path]]
    assert (again.name, again.base, again.sources) == ("many", "base", ("x", "y"))
    # One rank for all, as mlx-lm's layout asks for.
    assert {lora.rank for lora in again.modules.values()} == {again.rank}
    assert small.adapter(mx.bfloat16).modules["m00"].a.dtype == mx.bfloat16
    for path, stored in small.modules.items():
        alone = quantized(*modules[path].factors(), levels[path])
        assert np.allclose(dense(again.modules[path]), dense(plain(alone)), atol=1e-6)
        for level, other in zip(stored, alone, strict=True):
            for part, x in ((level.a, other.a), (level.b, other.b)):
                assert all(np.array_equal(vars(x)[name], y) for name, y in vars(part).items())
    assert compress(whole, levels, svd_components(whole)).adapter().digest == again.digest
    none = compress(whole, dict.fromkeys(modules, ()))
    assert none.modules == {} and none.adapter() is None and none.nbytes == 0


@numeric(
    st.integers(0, 2**16), sides, level_lists(), st.sampled_from((32, 64)), st.booleans(), n=30
)
def test_rounding_knows_the_numbers_that_its_codes_stand_for(seed, width, levels, group, symmetric):
    rng = np.random.default_rng(seed)
    rank = sum(n for n, _ in levels)
    rows, other = rng.normal(size=(rank, width)), rng.normal(size=(rank, rank + 3))
    (parts,), (values,) = gptq_round([other], [other], [rows], [levels], group, symmetric)
    assert np.array_equal(values, np.concatenate([oracle(part) for part in parts]))


@pytest.mark.parametrize("bits", [16, 8, 2])
def test_a_scaled_update_has_the_same_bytes(bits):
    a, b = factors_of(np.random.default_rng(6), (64, 96), 4)
    small = Compressed("one", {"m": quantized(a, b, [(2, bits)])})
    twice = small.scaled(1.7)
    assert small.scaled(1) is small and twice.nbytes == small.nbytes
    before, after = (dense(x.adapter().modules["m"]) for x in (small, twice))
    assert np.allclose(after, 1.7 * before, rtol=4e-3, atol=2e-3 * np.abs(before).max())
    (level,), (rescaled,) = small.modules["m"], twice.modules["m"]
    assert bits == 16 or (level.b.weight == rescaled.b.weight).all()


# The compact file: round trip, exact size, readable by safetensors, bad files refused

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


@pytest.mark.slow
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
    caught = pytest.raises(PackError, read_compact, path, adapter)
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
    pytest.raises(PackError, index_of, [first, odd]).match("a pack has one base model")
    pytest.raises(OverflowError, make_index, ["a"], None, [{Q: [(256, 4)]}], {Q: (300, 300)})
