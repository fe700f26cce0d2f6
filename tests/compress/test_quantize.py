"""Low-bit factors against affine dequantization written out, and against nearest rounding."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import NUMERIC, dense, lora_of, plain, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compressed import (
    BITS,
    Compressed,
    Level,
    dequantize,
    packed_columns,
)
from d2c_mlx.compress.quantize import compress, gptq_round, round_to_nearest, svd_components

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


def quantize_module(a, b, levels):
    """The levels of the only module of an adapter."""
    one = Adapter("one", {"m": LoRA(mx.array(a), mx.array(b))})
    return compress(one, {"m": levels}).modules.get("m", ())


def nearest_codes(a, b, levels):
    """The levels of the only module of an adapter, each component in its nearest codes."""
    pair = svd_components(Adapter("one", {"m": LoRA(mx.array(a), mx.array(b))}))["m"]
    sizes, left = [], len(pair[0])
    for n, bits in levels:
        sizes += [(min(n, left), bits)] * (left > 0)
        left -= n
    n = sum(n for n, _ in sizes)
    every = [round_to_nearest([rows[:n].astype(float)], [sizes])[0] for rows in pair]
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
)


@FEW
@given(modules)
def test_levels_are_what_was_asked_for_in_codes_no_worse_than_the_nearest(case):
    seed, shape, rank, levels = case
    a, b = factors_of(np.random.default_rng(seed), shape, rank)
    stored = quantize_module(a, b, levels)
    left, expected = min(rank, *shape), []
    for n, bits in levels:
        expected += [(min(n, left), bits)] * (left > 0)
        left -= n
    assert [(level.rank, level.bits) for level in stored] == expected
    parts = [part for level in stored for part in (level.a, level.b)]
    for part, values in zip(parts, dequantize([[part] for part in parts])):
        assert np.array_equal(values, oracle(part))
        words, groups = packed_columns(part.width, part.bits)
        assert part.weight.shape[1] == words and part.scales.shape[1] == groups
    lora = plain(stored)
    assert lora.a.dtype == lora.b.dtype == mx.float16 and lora.scale == 1.0
    assert np.array_equal(lora.a.T, np.concatenate([oracle(level.a) for level in stored]))
    assert np.array_equal(lora.b, np.concatenate([oracle(level.b) for level in stored]))
    nearest = nearest_codes(a, b, levels)
    assert error(a, b, stored) <= error(a, b, nearest) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("bits, share", [(8, 0.8), (4, 0.75), (3, 0.75), (2, 0.75)])
def test_much_better_than_the_nearest_codes_on_what_adapters_look_like(bits, share):
    a, b = factors_of(np.random.default_rng(0), (256, 192), 8)
    ours, nearest = (f(a, b, [(8, bits)]) for f in (quantize_module, nearest_codes))
    assert error(a, b, ours) < share * error(a, b, nearest)
    assert sum(level.nbytes for level in ours) == sum(level.nbytes for level in nearest)


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


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_nearest_is_what_mlx_reads(bits):
    rows = np.random.default_rng(5).normal(size=(3, 100))
    ((part,),) = round_to_nearest([rows], [[(3, bits)]])
    read = mx.dequantize(
        mx.array(part.weight), mx.array(part.scales), mx.array(part.biases), 64, bits
    )
    assert np.allclose(np.array(read)[:, :100], oracle(part), atol=4e-3)
    assert np.abs(oracle(part) - rows).max() < 7 / 2**bits


def test_modules_that_are_rounded_together_are_rounded_as_alone():
    """Any widths, ranks and levels, more modules than go at once."""
    rng = np.random.default_rng(7)
    modules, levels = {}, {}
    for i in range(40):
        shape, rank = (96, 64, 33)[i % 3], 1 + i % 7
        modules[f"m{i:02d}"] = lora_of(rng, (shape, (64, 100)[i % 2]), rank, 0.5)
        levels[f"m{i:02d}"] = ([(1, 16), (2, 4), (1, 3)], [(3, 8), (2, 2)], [(9, 3)], [])[i % 4]
    whole = Adapter("many", modules, "base", ("x", "y"))
    small = compress(whole, levels)
    assert list(small.modules) == [path for path in sorted(modules) if levels[path]]
    assert small.nbytes == sum(x.nbytes for module in small.modules.values() for x in module)
    again = small.adapter()
    assert (again.name, again.base, again.sources) == ("many", "base", ("x", "y"))
    # One rank for all, as mlx-lm's layout asks for.
    assert {lora.rank for lora in again.modules.values()} == {again.rank}
    assert small.adapter(mx.bfloat16).modules["m00"].a.dtype == mx.bfloat16
    for path, stored in small.modules.items():
        alone = quantize_module(*modules[path].factors(), levels[path])
        assert np.allclose(dense(again.modules[path]), dense(plain(alone)), atol=1e-6)
        assert [level.bits for level in stored] == [level.bits for level in alone]
        for level, other in zip(stored, alone):
            for a, b in ((level.a, other.a), (level.b, other.b)):
                for name in ("weight", "scales", "biases"):
                    assert np.array_equal(getattr(a, name), getattr(b, name))
    known = compress(whole, levels, parts=svd_components(whole))
    assert known.adapter().digest == again.digest
    none = compress(whole, dict.fromkeys(modules, ()))
    assert none.modules == {} and none.adapter() is None and none.nbytes == 0
    assert Compressed("empty", {}).adapter() is None


@FEW
@given(st.integers(0, 2**16), st.integers(1, 150), level_lists(), st.sampled_from((32, 64)))
def test_rounding_knows_the_numbers_that_its_codes_stand_for(seed, width, levels, group):
    rng = np.random.default_rng(seed)
    rank = sum(n for n, _ in levels)
    rows, other = rng.normal(size=(rank, width)), rng.normal(size=(rank, rank + 3))
    for symmetric in (False, True):
        (parts,), (values,) = gptq_round([other], [other], [rows], [levels], group, symmetric)
        assert np.array_equal(values, np.concatenate([oracle(part) for part in parts]))


@pytest.mark.parametrize("bits", [16, 8, 2])
def test_a_scaled_update_has_the_same_bytes(bits):
    a, b = factors_of(np.random.default_rng(6), (64, 96), 4)
    small = Compressed("one", {"m": quantize_module(a, b, [(2, bits)])})
    twice = small.scaled(1.7)
    assert small.scaled(1) is small and twice.nbytes == small.nbytes
    before, after = (dense(x.adapter().modules["m"]) for x in (small, twice))
    assert np.allclose(after, 1.7 * before, rtol=4e-3, atol=2e-3 * np.abs(before).max())
    (level,), (scaled,) = small.modules["m"], twice.modules["m"]
    assert bits == 16 or (level.b.weight == scaled.b.weight).all()
