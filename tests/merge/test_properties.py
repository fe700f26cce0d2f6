"""What holds for every merge method, and what each promises beside that (helpers/methods.py)."""

import re
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.loras import (
    NUMERIC,
    P,
    Q,
    R,
    adapters_of,
    assert_close,
    dense,
    dense_mean,
    dims,
    inputs_of,
    lora_of,
    merge_by,
)
from helpers.methods import DRAWING, PROMISES, WEIGHTED
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import METHODS, find_method, merge_adapters, scaled
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.utils.errors import AdapterError, ConfigError


def test_every_method_promises_something():
    assert PROMISES.keys() == {*METHODS, *names(MERGE_METHODS)} and len(PROMISES) == 16
    for name, promise in PROMISES.items():
        method = find_method(name)
        assert method.weighted == bool(promise.weights)
        assert method.sums_ranks == promise.keeps_all_columns


@pytest.mark.parametrize("method", PROMISES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_one_adapter_is_returned_bit_for_bit(method, dtype):
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (6, 5), 2, 3.0, dtype), Q: lora_of(rng, (3, 3), 1)}, "base")
    merged = merge_by([one], method, density=0.1)
    assert merged.digest == one.digest
    for path, lora in one.modules.items():
        same = merged.modules[path]
        assert (same.a.dtype, same.b.dtype, same.scale) == (lora.a.dtype, lora.b.dtype, lora.scale)
        assert mx.array_equal(same.a, lora.a) and mx.array_equal(same.b, lora.b)
    assert (merged.name, merged.base, merged.sources) == ("a", "base", ("a",))
    again = Adapter("ab", one.modules, None, ("a", "b"))
    assert merge_adapters([again]).sources == ("a", "b")


@settings(NUMERIC, max_examples=120)
@given(
    st.sampled_from(sorted(PROMISES)),
    st.tuples(dims, dims),
    st.integers(1, 5),
    st.permutations(range(4)),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 10_000),
)
def test_order_and_repetition_change_no_bit(method, shape, rank, order, density, seed):
    adapters = adapters_of(np.random.default_rng(seed), 4, {P: shape, Q: (5, 11)})
    options = {"density": density, "rank": rank, "seed": seed}
    merged = merge_by(adapters, method, **options)
    for again in (adapters, [adapters[i] for i in order]):
        same = merge_by(again, method, **options)
        assert (same.digest, same.name, same.sources) == (
            merged.digest,
            merged.name,
            merged.sources,
        )


@pytest.mark.parametrize("method", PROMISES)
def test_order_does_not_matter_among_equal_names(method):
    rng = np.random.default_rng(0)
    adapters = [Adapter("same", {P: lora_of(rng, (9, 7), 3)}) for _ in range(3)]
    digests = {merge_by(adapters[i:] + adapters[:i], method).digest for i in range(3)}
    assert len(digests) == 1


def equal_adapters(copies, seed=0, shape=(9, 7)):
    rng = np.random.default_rng(seed)
    modules = {
        P: lora_of(rng, shape, 3, 4.0),
        Q: lora_of(rng, (1, 1), 2),
        R: lora_of(rng, (2, 8), 4),
    }
    return [Adapter(f"t{i}", modules) for i in range(copies)]


def assert_same(merged, modules, times=1.0):
    for path, lora in modules.items():
        expected = times * dense(lora)
        assert_close(dense(merged.modules[path]), expected, np.linalg.norm(expected), 1e-5)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_adapters_where_a_method_defines_something_else(copies):
    """Module by module, as ranks differ."""
    modules = equal_adapters(1)[0].modules
    for (method, promise), path in product(PROMISES.items(), modules):
        alone = [Adapter(f"t{i}", {path: modules[path]}) for i in range(copies)]
        delta = dense(modules[path])
        rank = promise.rank_of_equals(copies, modules[path].rank, np.linalg.matrix_rank(delta))
        expected = promise.of_equals(delta, copies, rank)
        merged = merge_by(alone, method, density=1.0, rank=rank)
        assert_close(dense(merged.modules[path]), expected, np.linalg.norm(expected), 1e-5)


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims), st.integers(2, 4), st.integers(1, 6), st.sampled_from(sorted(PROMISES))
)
def test_rank_is_at_most_what_was_asked(shape, n, rank, method):
    adapters = adapters_of(np.random.default_rng(n), n, {P: shape, Q: (4, 2)})
    merged = merge_by(adapters, method, rank=rank)
    for path, lora in merged.modules.items():
        total = sum(a.modules[path].rank for a in adapters if path in a.modules)
        assert lora.shape == next(a.modules[path].shape for a in adapters if path in a.modules)
        assert lora.a.shape[1] == lora.b.shape[0] == lora.rank
        if PROMISES[method].keeps_all_columns:
            assert lora.rank == total
        else:
            assert lora.rank <= min(rank, total)
        assert lora.scale == 1.0 and lora.a.dtype == lora.b.dtype == mx.float32
        assert np.isfinite(dense(lora)).all()


@pytest.mark.parametrize("method", PROMISES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_large_16_bit_factors_do_not_overflow(method, dtype):
    # Products of the stored values are far beyond float16's 65504.
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(name, {P: lora_of(rng, (12, 10), 4, 64.0, dtype, size=1e4)}) for name in "ab"
    ]
    merged = merge_by(adapters, method, density=1.0, rank=8)
    found = dense(merged.modules[P])
    assert np.isfinite(found).all() and np.abs(found).max() > 1e9
    if PROMISES[method].exact:
        mean = dense_mean(adapters, P, (12, 10))
        assert_close(found, mean, np.linalg.norm(mean))


@pytest.mark.parametrize("method", PROMISES)
def test_updates_of_zero(method):
    rng = np.random.default_rng(0)
    zero = LoRA(mx.ones((6, 2)), mx.zeros((2, 5)))
    merged = merge_by([Adapter("a", {P: zero}), Adapter("b", {P: zero})], method)
    assert np.array_equal(dense(merged.modules[P]), np.zeros((5, 6)))
    half = merge_by([Adapter("a", {P: zero}), Adapter("b", {P: lora_of(rng, (6, 5), 2)})], method)
    assert np.isfinite(dense(half.modules[P])).all()


@pytest.mark.parametrize("method", PROMISES)
def test_rank_deficient_updates(method):
    """Parallel columns, a column of zeros, and one task whose update is a multiple of another's."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 1)), rng.normal(size=(3, 6))
    a = np.concatenate([a, 2 * a, 0 * a], axis=1)
    loras = [LoRA(mx.array(a), mx.array(b), scale) for scale in (1.0, -0.5)]
    loras.append(lora_of(rng, (8, 6), 2, 3.0))
    adapters = [Adapter(f"t{i}", {P: lora}) for i, lora in enumerate(loras)]
    for rank in (1, 3, 20):
        merged = merge_by(adapters, method, rank=rank)
        found = dense(merged.modules[P])
        assert np.isfinite(found).all()
        assert np.linalg.norm(found) < 10 * sum(np.linalg.norm(dense(lora)) for lora in loras)


@pytest.mark.parametrize("method", DRAWING)
def test_seeds(method):
    adapters = adapters_of(np.random.default_rng(3), 4, {P: (12, 10), Q: (9, 9)})
    digests = [merge_adapters(adapters, method, rank=2, seed=seed).digest for seed in (0, 1, 0)]
    assert digests[0] == digests[2]
    if PROMISES[method].draws == "yes":
        assert digests[0] != digests[1]
        lora = lora_of(np.random.default_rng(0), (9, 7), 4)
        merged = merge_adapters([Adapter(name, {P: lora, Q: lora}) for name in "ab"], method)
        assert not mx.array_equal(merged.modules[P].a, merged.modules[Q].a)


def test_weights_follow_their_adapters():
    adapters = adapters_of(np.random.default_rng(0), 3, {P: (9, 7), Q: (5, 6)})
    weights = [2.0, -0.5, 0.25]
    for method in WEIGHTED:
        promise = PROMISES[method]
        merged = merge_adapters(adapters, method, weights=weights, rank=20)
        again = merge_adapters(adapters[::-1], method, weights=weights[::-1], rank=20)
        assert merged.digest == again.digest
        if promise.weights == "dW":
            for path, lora in merged.modules.items():
                pairs = [
                    (w, a.modules[path]) for w, a in zip(weights, adapters) if path in a.modules
                ]
                expected = sum(w * dense(lora) for w, lora in pairs)
                assert_close(dense(lora), expected, np.linalg.norm(expected), 1e-5)
    twice = merge_adapters(adapters[:1], weights=[2.0])
    assert_same(twice, adapters[0].modules, 2.0)


@pytest.mark.parametrize("method", PROMISES)
def test_merges_of_factors_beyond_float16_are_stored(method):
    """1e6 beside 1e-4, with the largest scale that is tried: no infinity, and the same update."""
    rng = np.random.default_rng(1)
    loras = [lora_of(rng, (9, 6), 3) for _ in "ab"]
    adapters = [Adapter(name, {P: LoRA(x.a * 1e6, x.b * 1e-4)}) for name, x in zip("ab", loras)]
    whole = scaled(merge_by(adapters, method, density=1.0, rank=3), 4.0)
    exact = dense(whole.modules[P])
    half = whole.uniform(mx.float16).modules[P]
    assert np.linalg.norm(exact) > 1
    assert_close(dense(half), exact, np.linalg.norm(exact), 3e-3)


@pytest.mark.parametrize("method", PROMISES)
def test_merges_of_tiny_updates_are_tiny(method):
    rng = np.random.default_rng(2)
    adapters = [Adapter(name, {P: lora_of(rng, (9, 6), 3, size=1e-18)}) for name in "ab"]
    merged = dense(merge_by(adapters, method, density=1.0, rank=3).modules[P])
    assert np.isfinite(merged).all() and np.abs(merged).max() < 1e-30


@pytest.mark.parametrize("method", PROMISES)
@pytest.mark.parametrize("size", [4.0, 0.25])
def test_a_common_scale_goes_through(method, size):
    """Merging updates of another size gives the merge in that size."""
    adapters = adapters_of(np.random.default_rng(4), 3, {P: (9, 7), Q: (5, 6)})
    larger = [
        replace(one, modules={p: LoRA(x.a, x.b, size * x.scale) for p, x in one.modules.items()})
        for one in adapters
    ]
    activations = inputs_of(adapters) if method == "regmean" else None
    merged, found = (
        merge_adapters(some, method, rank=3, activations=activations) for some in (adapters, larger)
    )
    for path, lora in merged.modules.items():
        expected = size * dense(lora)
        assert_close(dense(found.modules[path]), expected, np.linalg.norm(expected), 1e-4)


@pytest.mark.parametrize("method", [name for name in PROMISES if name not in DRAWING])
def test_only_methods_that_draw_ask_for_the_seed(method):
    adapters = adapters_of(np.random.default_rng(3), 4, {P: (12, 10), Q: (9, 9)})
    digests = {merge_by(adapters, method, rank=2, seed=seed).digest for seed in (0, 1)}
    assert len(digests) == 1


def test_options_that_are_wrong_are_named():
    adapters = adapters_of(np.random.default_rng(0), 3, {P: (9, 7), Q: (5, 6)})
    wrong = {
        "density: found 0.0": {"density": 0.0},
        "rank: found 0": {"rank": 0},
        "weights: 'ties' takes none": {"method": "ties", "weights": [1, 1, 1]},
        "weights: found": {"weights": [1.0, float("nan"), 1.0]},
        "activations: 'linear' takes none": {"activations": {}},
        "activations: 'regmean' needs 3 arrays.*2 lack them": {"method": "regmean"},
    }
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=message):
            merge_adapters(adapters, **options)
    with pytest.raises(ConfigError) as error:
        merge_adapters([], density=2.0, rank=-1)
    assert len(error.value.problems) == 3
    inputs = inputs_of(adapters)
    inputs[P][1] = np.zeros((4, 8))
    with pytest.raises(ConfigError, match="activations: model.layers.0.q.*expected .n_tokens, 9."):
        merge_adapters(adapters, "regmean", activations=inputs)


def test_adapters_of_different_bases_are_refused():
    rng = np.random.default_rng(0)
    adapters = [Adapter(str(i), {P: lora_of(rng, (4 + i, 5), 1)}) for i in range(2)]
    with pytest.raises(AdapterError, match="model.layers.0.q: .*different base models.*4, 5.*5, 5"):
        merge_adapters(adapters)


def test_the_table_of_the_documents_is_true():
    """merge-methods.md: one row per method, each of which runs on whatever is put together."""
    text = (ROOT / "docs" / "reference" / "merge-methods.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    of_runs, rows = rows[:2], rows[2:]
    assert [row[0] for row in of_runs] == ["`layerwise`", "`regmean++`"]
    assert all("of a run only" in row[1] for row in of_runs)
    assert [row[0].strip("`") for row in rows] == list(PROMISES)
    adapters = adapters_of(np.random.default_rng(1), 5, {P: (9, 7), Q: (5, 6), R: (4, 4)})
    assert len({lora.rank for adapter in adapters for lora in adapter.modules.values()}) > 2
    assert len({tuple(adapter.modules) for adapter in adapters}) > 1
    for name, *cells in rows:
        assert len(cells) == 1 and all(cells)
        merged = merge_by(adapters, name.strip("`"))
        assert set(merged.modules) == {P, Q, R}
        assert merge_by(adapters[:1], name.strip("`")).digest == adapters[0].digest
    named = set(re.findall(r"`([a-z_-]+)=", text))
    assert named <= {"seed", "weights", "density", "rank", "activations"}


def test_unknown_method():
    rng = np.random.default_rng(0)
    adapter = Adapter("a", {P: lora_of(rng, (3, 3), 1)})
    for adapters in ([adapter], [adapter, adapter]):
        with pytest.raises(ConfigError, match="merge_method: found 'dare', .* of linear, ties"):
            merge_adapters(adapters, "dare")
