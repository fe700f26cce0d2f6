"""What holds for every merge method; options; the lists of methods in documents and config."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import (
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

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.cluster.d2c import INITS
from d2c_mlx.merge.methods import METHODS, WEIGHTED, merge_adapters
from d2c_mlx.merge.options import MERGE_METHODS
from d2c_mlx.run import config
from d2c_mlx.utils.errors import AdapterError, ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS)
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
    st.sampled_from(sorted(METHODS)),
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


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter_among_equal_names(method):
    rng = np.random.default_rng(0)
    adapters = [Adapter("same", {P: lora_of(rng, (9, 7), 3)}) for _ in range(3)]
    digests = {merge_by(adapters[i:] + adapters[:i], method).digest for i in range(3)}
    assert len(digests) == 1


# At density 1 nothing is trimmed or dropped.
SELVES = ("linear", "ties", "dare-linear", "dare-ties", "emr", "knots", "regmean", "wudi", "concat")


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


@settings(NUMERIC, max_examples=80)
@given(st.sampled_from(SELVES), st.integers(2, 5), st.tuples(dims, dims), st.integers(0, 10_000))
def test_equal_adapters_merge_to_themselves(method, copies, shape, seed):
    adapters = equal_adapters(copies, seed, shape)
    assert_same(merge_by(adapters, method, density=1.0), adapters[0].modules)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_adapters_where_a_method_defines_something_else(copies):
    adapters = equal_adapters(copies)
    modules = adapters[0].modules
    assert_same(merge_adapters(adapters, "tsv", rank=4 * copies), modules)
    assert_same(merge_adapters(adapters, "factor-linear"), modules, copies)
    assert_same(merge_adapters(adapters, "lego"), modules)
    for path, rank in ((P, 3), (Q, 1), (R, 2)):
        alone = [Adapter(one.name, {path: one.modules[path]}) for one in adapters]
        u, s, vt = np.linalg.svd(dense(modules[path]), full_matrices=False)
        flat = copies * s[:rank].mean() * u[:, :rank] @ vt[:rank]
        for method in ("iso-c", "iso-cts"):
            merged = merge_adapters(alone, method, rank=rank)
            assert_close(dense(merged.modules[path]), flat, np.linalg.norm(flat), 1e-5)


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims), st.integers(2, 4), st.integers(1, 6), st.sampled_from(sorted(METHODS))
)
def test_rank_is_at_most_what_was_asked(shape, n, rank, method):
    adapters = adapters_of(np.random.default_rng(n), n, {P: shape, Q: (4, 2)})
    merged = merge_by(adapters, method, rank=rank)
    for path, lora in merged.modules.items():
        total = sum(a.modules[path].rank for a in adapters if path in a.modules)
        assert lora.shape == next(a.modules[path].shape for a in adapters if path in a.modules)
        assert lora.a.shape[1] == lora.b.shape[0] == lora.rank
        assert lora.rank <= min(rank, total) if method != "concat" else lora.rank == total
        assert lora.scale == 1.0 and lora.a.dtype == lora.b.dtype == mx.float32
        assert np.isfinite(dense(lora)).all()


@pytest.mark.parametrize("method", METHODS)
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
    if method == "linear":
        mean = dense_mean(adapters, P, (12, 10))
        assert_close(found, mean, np.linalg.norm(mean))


@pytest.mark.parametrize("method", METHODS)
def test_updates_of_zero(method):
    rng = np.random.default_rng(0)
    zero = LoRA(mx.ones((6, 2)), mx.zeros((2, 5)))
    merged = merge_by([Adapter("a", {P: zero}), Adapter("b", {P: zero})], method)
    assert np.array_equal(dense(merged.modules[P]), np.zeros((5, 6)))
    half = merge_by([Adapter("a", {P: zero}), Adapter("b", {P: lora_of(rng, (6, 5), 2)})], method)
    assert np.isfinite(dense(half.modules[P])).all()


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties", "lego"])
def test_seeds(method):
    adapters = adapters_of(np.random.default_rng(3), 4, {P: (12, 10), Q: (9, 9)})
    digests = [merge_adapters(adapters, method, rank=2, seed=seed).digest for seed in (0, 1, 0)]
    assert digests[0] == digests[2]
    if method != "lego":  # K-Means may find the same clusters from another seed.
        assert digests[0] != digests[1]
        lora = lora_of(np.random.default_rng(0), (9, 7), 4)
        merged = merge_adapters([Adapter(name, {P: lora, Q: lora}) for name in "ab"], method)
        assert not mx.array_equal(merged.modules[P].a, merged.modules[Q].a)


def test_weights_follow_their_adapters():
    adapters = adapters_of(np.random.default_rng(0), 3, {P: (9, 7), Q: (5, 6)})
    weights = [2.0, -0.5, 0.25]
    for method in WEIGHTED:
        merged = merge_adapters(adapters, method, weights=weights, rank=20)
        again = merge_adapters(adapters[::-1], method, weights=weights[::-1], rank=20)
        assert merged.digest == again.digest
        if method != "factor-linear":
            for path, lora in merged.modules.items():
                pairs = [
                    (w, a.modules[path]) for w, a in zip(weights, adapters) if path in a.modules
                ]
                expected = sum(w * dense(lora) for w, lora in pairs)
                assert_close(dense(lora), expected, np.linalg.norm(expected), 1e-5)
    twice = merge_adapters(adapters[:1], weights=[2.0])
    assert_same(twice, adapters[0].modules, 2.0)


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
    """docs/merging.md: one row per method, each of which runs on whatever is put together."""
    text = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == list(METHODS)
    adapters = adapters_of(np.random.default_rng(1), 5, {P: (9, 7), Q: (5, 6), R: (4, 4)})
    assert len({lora.rank for one in adapters for lora in one.modules.values()}) > 2
    assert len({tuple(one.modules) for one in adapters}) > 1
    for name, *cells in rows:
        assert len(cells) == 3 and all(cells)
        merged = merge_by(adapters, name.strip("`"))
        assert set(merged.modules) == {P, Q, R}
        assert merge_by(adapters[:1], name.strip("`")).digest == adapters[0].digest
    named = set(re.findall(r"`([a-z_-]+)=", text))
    assert named <= {"seed", "weights", "density", "rank", "activations"}


def test_unknown_method():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (3, 3), 1)})
    for adapters in ([one], [one, one]):
        with pytest.raises(ConfigError, match="merge_method: 'dare' is unknown.*linear.*ties"):
            merge_adapters(adapters, "dare")


def test_lists_repeated_in_config_are_true():
    assert MERGE_METHODS == tuple(METHODS)
    assert set(config.STARTS) < set(INITS)
