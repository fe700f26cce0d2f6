"""Low-bit factors against affine dequantization written out, and against nearest rounding."""

from itertools import accumulate

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import NUMERIC, dense, lora_of, plain, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compressed import (
    BITS,
    GROUP_SIZES,
    Compressed,
    Level,
    dequantize,
    packed_columns,
)
from d2c_mlx.compress.quantize import _squared_errors, compress, svd_components
from d2c_mlx.compress.rounding import gptq_round, hartley_rotation, round_to_nearest

FEW = settings(NUMERIC, max_examples=30)


def unpacked(words, bits):
    """Codes of one row of words, bit by bit: code k is bits k * bits ... of a stream."""
    stream = [(int(word) >> i) & 1 for word in words for i in range(32)]
    return [
        sum(bit << i for i, bit in enumerate(stream[start : start + bits]))
        for start in range(0, len(stream) - bits + 1, bits)
    ]


def oracle(part):
    """The float16 numbers of a Quantized, from its codes, one by one."""
    if part.bits == 16:
        return part.weight
    rows = []
    for words, scales, biases in zip(part.weight, part.scales, part.biases):
        codes = unpacked(words, part.bits)
        rows.append(
            [
                np.float16(
                    np.float32(scales[k // part.group_size]) * np.float32(codes[k])
                    + np.float32(biases[k // part.group_size])
                )
                for k in range(part.width)
            ]
        )
    return np.array(rows, np.float16).reshape(len(part.weight), part.width)


def factors_of(rng, shape, rank, decay=0.7):
    """Factors whose singular values fall as those of trained adapters do."""
    a = rng.normal(size=(shape[0], rank)) / np.sqrt(shape[0])
    b = rng.normal(size=(rank, shape[1])) / np.sqrt(shape[1]) * decay ** np.arange(rank)[:, None]
    return a.astype(np.float32), b.astype(np.float32)


def quantize_module(a, b, levels, *options):
    """The levels of the only module of an adapter."""
    one = Adapter("one", {"m": LoRA(mx.array(a), mx.array(b))})
    return compress(one, {"m": levels}, *options).modules.get("m", ())


def nearest_codes(a, b, levels, group=64):
    """The levels of the only module of an adapter, each component in its nearest codes."""
    pair = svd_components(Adapter("one", {"m": LoRA(mx.array(a), mx.array(b))}))["m"]
    sizes, left = [], len(pair[0])
    for n, bits in levels:
        sizes += [(min(n, left), bits)] * (left > 0)
        left -= n
    n = sum(n for n, _ in sizes)
    every = [round_to_nearest([rows[:n].astype(float)], [sizes], group)[0] for rows in pair]
    return [Level(*factors) for factors in zip(*every)]


def error(a, b, levels):
    """Of what levels store, relative to dW in Frobenius norm."""
    exact = dense(LoRA(mx.array(a), mx.array(b)))
    return np.linalg.norm(dense(plain(levels)) - exact) / np.linalg.norm(exact)


@st.composite
def level_lists(draw):
    bits = sorted(draw(st.sets(st.sampled_from(BITS), min_size=1, max_size=3)), reverse=True)
    return [(draw(st.integers(1, 5)), b) for b in bits]


modules = st.tuples(
    st.integers(0, 2**16),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.integers(1, 7),
    level_lists(),
    st.sampled_from(GROUP_SIZES),
)


@FEW
@given(modules)
def test_values_are_those_of_the_stored_codes(case):
    seed, shape, rank, levels, group = case
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    found = quantize_module(a, b, levels, group)
    parts = [part for level in found for part in (level.a, level.b)]
    for part, values in zip(parts, dequantize(parts)):
        assert np.array_equal(np.array(values), oracle(part))
        words, groups = packed_columns(part.width, part.bits, group)
        assert part.weight.shape[1] == words and part.scales.shape[1] == groups
    lora = plain(found)
    assert lora.a.dtype == lora.b.dtype == mx.float16 and lora.scale == 1.0
    assert lora.shape == shape
    a = np.concatenate([oracle(level.a) for level in found])
    assert np.array_equal(np.array(lora.a), a.T)


@FEW
@given(modules)
def test_levels_get_their_components_and_no_more(case):
    seed, shape, rank, levels, group = case
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    found = quantize_module(a, b, levels, group)
    left = min(rank, *shape)
    expected = []
    for n, bits in levels:
        if left > 0:
            expected.append((min(n, left), bits))
        left -= n
    assert [(level.rank, level.bits) for level in found] == expected


@FEW
@given(modules)
def test_never_worse_than_the_nearest_codes(case):
    seed, shape, rank, levels, group = case
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    ours, nearest = (f(a, b, levels, group) for f in (quantize_module, nearest_codes))
    assert error(a, b, ours) <= error(a, b, nearest) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("bits, share", [(8, 0.8), (4, 0.75), (3, 0.75), (2, 0.75)])
def test_much_better_than_the_nearest_codes_on_what_adapters_look_like(bits, share):
    a, b = factors_of(np.random.default_rng(0), (256, 192), 8)
    ours, nearest = (f(a, b, [(8, bits)]) for f in (quantize_module, nearest_codes))
    assert error(a, b, ours) < share * error(a, b, nearest)
    assert sum(level.nbytes for level in ours) == sum(level.nbytes for level in nearest)


@FEW
@given(modules)
def test_error_is_that_of_the_dense_update(case):
    seed, shape, rank, levels, group = case
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    found = quantize_module(a, b, levels, group)
    exact = float(np.sum(dense(LoRA(mx.array(a), mx.array(b))) ** 2))
    rows = [np.concatenate([oracle(getattr(level, name)) for level in found]) for name in "ab"]
    stored = ([x.astype(np.float64)] for x in rows)
    (squared,) = _squared_errors([(a.T.astype(np.float64), b.astype(np.float64))], *stored)
    expected = error(a, b, found) ** 2 * exact
    assert squared == pytest.approx(expected, rel=1e-3, abs=1e-12 * exact)


@FEW
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6))
def test_sixteen_bits_are_the_best_factors_to_float16(seed, rank, kept):
    lora = lora_of(np.random.default_rng(seed), (40, 30), rank, 1.5)
    found = plain(quantize_module(*lora.factors(), [(kept, 16)]))
    best = truncated(dense(lora), kept)
    assert np.linalg.norm(dense(found) - best) <= 1e-3 * np.linalg.norm(best)


def test_leading_components_go_to_the_first_level():
    a, b = factors_of(np.random.default_rng(1), (64, 64), 6, decay=0.3)
    first, second = quantize_module(a, b, [(2, 16), (4, 4)])
    exact = dense(LoRA(mx.array(a), mx.array(b)))
    leading = dense(plain([first]))
    assert np.linalg.norm(leading - truncated(exact, 2)) < 0.05 * np.linalg.norm(exact)
    assert error(a, b, (first, second)) < error(a, b, (first,)) / 2


def test_an_update_of_zero_and_of_low_rank():
    a, b = factors_of(np.random.default_rng(2), (64, 32), 4)
    assert quantize_module(a, 0 * b, [(4, 4)]) == ()
    assert quantize_module(a[:, :0], b[:0], [(4, 4)]) == ()
    twice = np.concatenate([a, a], axis=1), np.concatenate([b, b])
    (level,) = quantize_module(*twice, [(8, 4)])
    assert level.rank == 4


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3])
def test_errors_do_not_depend_on_the_size_of_the_update(size):
    a, b = factors_of(np.random.default_rng(3), (128, 128), 4)
    same, other = (error(a, x, quantize_module(a, x, [(4, 4)])) for x in (b, b * size))
    assert other == pytest.approx(same, rel=0.2)


def test_a_spectrum_that_falls_fast_stays_finite():
    a, b = factors_of(np.random.default_rng(4), (96, 96), 12, decay=0.1)
    for bits in BITS:
        found = quantize_module(a, b, [(12, bits)])
        assert np.isfinite(dense(plain(found))).all()
        assert error(a, b, found) < 0.5


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(BITS)), min_size=1, max_size=3))
def test_mixing_is_orthogonal_within_levels(sizes):
    mix = hartley_rotation(sizes)
    assert np.allclose(mix @ mix.T, np.eye(len(mix)))
    for stop, (n, _) in zip(accumulate(n for n, _ in sizes), sizes):
        assert not mix[stop - n : stop, : stop - n].any() and not mix[stop - n : stop, stop:].any()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_nearest_is_what_mlx_reads(bits):
    rows = np.random.default_rng(5).normal(size=(3, 100))
    ((part,),) = round_to_nearest([rows], [[(3, bits)]], 64)
    read = mx.dequantize(
        mx.array(part.weight), mx.array(part.scales), mx.array(part.biases), 64, bits
    )
    assert np.allclose(np.array(read)[:, :100], oracle(part), atol=4e-3)
    assert np.abs(oracle(part) - rows).max() < 7 / 2**bits


def adapter():
    rng = np.random.default_rng(6)
    shapes = {
        "model.layers.0.q": (64, 96),
        "model.layers.1.q": (64, 96),
        "model.layers.1.v": (64, 32),
    }
    modules = {path: lora_of(rng, shape, 4, 0.5) for path, shape in shapes.items()}
    return Adapter("one", modules, "base", ("x", "y"))


def test_compress_an_adapter():
    whole = adapter()
    levels = {path: [(2, 8), (2, 3)] for path in whole.modules} | {"model.layers.1.v": [(1, 4)]}
    small = compress(whole, levels, 32)
    again = small.adapter()
    assert (again.name, again.base, again.sources) == ("one", "base", ("x", "y"))
    assert small.nbytes == sum(x.nbytes for ls in small.modules.values() for x in ls)
    for path, lora in whole.modules.items():
        expected = dense(plain(quantize_module(*lora.factors(), levels[path], 32)))
        assert np.allclose(dense(again.modules[path]), expected, atol=1e-6)
        # One rank for all, as mlx-lm's layout asks for.
        assert again.modules[path].rank == 4
        assert again.modules[path].a.dtype == mx.float16
    assert again.uniform().digest == again.digest
    assert small.adapter(mx.bfloat16).modules["model.layers.0.q"].a.dtype == mx.bfloat16


def test_modules_that_are_rounded_together_are_rounded_as_alone():
    """Any widths, ranks and levels, more modules than go at once."""
    rng = np.random.default_rng(7)
    modules, levels = {}, {}
    for i in range(40):
        shape, rank = (96, 64, 33)[i % 3], 1 + i % 7
        modules[f"m{i:02d}"] = lora_of(rng, (shape, (64, 100)[i % 2]), rank, 0.5)
        levels[f"m{i:02d}"] = ([(1, 16), (2, 4), (1, 3)], [(3, 8), (2, 2)], [(9, 3)], [])[i % 4]
    whole = Adapter("many", modules)
    small = compress(whole, levels)
    assert list(small.modules) == [path for path in sorted(modules) if levels[path]]
    for path, some in small.modules.items():
        alone = quantize_module(*modules[path].factors(), levels[path])
        assert [level.bits for level in some] == [level.bits for level in alone]
        for one, other in zip(some, alone):
            for a, b in ((one.a, other.a), (one.b, other.b)):
                for name in ("weight", "scales", "biases"):
                    assert np.array_equal(getattr(a, name), getattr(b, name))
    known = compress(whole, levels, parts=svd_components(whole))
    assert known.adapter().digest == small.adapter().digest


@FEW
@given(st.integers(0, 2**16), st.integers(1, 150), level_lists(), st.sampled_from(GROUP_SIZES))
def test_rounding_knows_the_numbers_that_its_codes_stand_for(seed, width, levels, group):
    rng = np.random.default_rng(seed)
    rank = sum(n for n, _ in levels)
    rows, other = rng.normal(size=(rank, width)), rng.normal(size=(rank, rank + 3))
    ((parts, values),) = gptq_round([rows], [other @ other.T], [levels], group)
    assert np.array_equal(values, np.concatenate([oracle(part) for part in parts]))


@pytest.mark.parametrize("bits", [16, 8, 2])
def test_a_scaled_update_has_the_same_bytes(bits):
    whole = adapter()
    small = compress(whole, dict.fromkeys(whole.modules, [(2, bits)]))
    assert small.scaled(1) is small
    twice = small.scaled(1.7)
    assert twice.nbytes == small.nbytes
    for path, lora in small.adapter().modules.items():
        assert np.allclose(dense(twice.adapter().modules[path]), 1.7 * dense(lora), rtol=4e-3,
                           atol=2e-3 * np.abs(dense(lora)).max())  # fmt: skip
    if bits < 16:
        pairs = zip(small.modules["model.layers.0.q"], twice.modules["model.layers.0.q"])
        assert all((one.b.weight == other.b.weight).all() for one, other in pairs)


def test_dropped_modules_disappear_and_an_empty_adapter_is_the_base():
    whole = adapter()
    some = compress(whole, {path: [(2, 4)] for path in whole.modules if "1" in path})
    assert sorted(some.adapter().modules) == ["model.layers.1.q", "model.layers.1.v"]
    none = compress(whole, dict.fromkeys(whole.modules, ()))
    assert none.modules == {} and none.adapter() is None and none.nbytes == 0
    assert Compressed("empty", {}).adapter() is None
