"""Low-bit factors against affine dequantization written out, and against nearest rounding."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import dense, lora_of, numeric, plain
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compressed import BITS, Compressed, dequantize, packed_columns
from d2c_mlx.compress.quantize import compress, gptq_round, svd_components


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
    """Of the same components, each in the codes of MLX's own `quantize`."""
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
