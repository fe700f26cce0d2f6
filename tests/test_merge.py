import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx import cluster, config
from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.errors import ConfigError
from d2c_mlx.merge import METHODS, merge_adapters, scaled
from d2c_mlx.merge.core import factorise, to_core
from d2c_mlx.merge.methods import linear, ties

P, Q, R = "model.layers.0.q", "model.layers.0.v", "model.layers.1.q"


def lora_of(rng, shape, rank, scale=1.0, dtype=mx.float32, size=1.0):
    a = rng.normal(size=(shape[0], rank)) * size
    b = rng.normal(size=(rank, shape[1])) * size
    return LoRA(mx.array(a).astype(dtype), mx.array(b).astype(dtype), scale)


def adapters_of(rng, n, shapes, max_rank=4, dtypes=(mx.float32, mx.float16)):
    """Mixed ranks, scales and dtypes; modules go missing, but never all of an adapter's."""
    adapters = []
    for i in range(n):
        keep = [path for j, path in enumerate(shapes) if j == i % len(shapes) or rng.random() < 0.6]
        modules = {
            path: lora_of(
                rng,
                shapes[path],
                int(rng.integers(1, max_rank + 1)),
                float(rng.uniform(0.1, 20)),
                dtypes[int(rng.integers(len(dtypes)))],
            )
            for path in keep
        }
        adapters.append(Adapter(f"t{i}", modules, "base"))
    return adapters


def dense(lora):
    """dW as (out, in), in float64, by a plain sum over the rank."""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (lora.a, lora.b))
    total = np.zeros((b.shape[1], a.shape[0]))
    for r in range(a.shape[1]):
        total += lora.scale * np.outer(b[r], a[:, r])
    return total


def dense_mean(adapters, path, shape):
    total = np.zeros(shape[::-1])
    for adapter in adapters:
        if path in adapter.modules:
            total += dense(adapter.modules[path])
    return total / len(adapters)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_close(found, expected, size, rtol=1e-4):
    """Relative to `size`, the norm of what was merged: a mean may cancel to nearly nothing."""
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) <= rtol * max(size, 1e-30)


dims = st.integers(1, 9)
# The same examples on every run: float32 may flip a sign or a threshold once in a million.
NUMERIC = settings(deadline=None, derandomize=True)


# Linear


@settings(NUMERIC, max_examples=40)
@given(st.tuples(dims, dims), st.tuples(dims, dims), st.integers(2, 5), st.integers(0, 10_000))
def test_linear_without_truncation_is_the_dense_mean(one, two, n, seed):
    shapes = {P: one, Q: two, R: (1, 1)}
    adapters = adapters_of(np.random.default_rng(seed), n, shapes)
    merged = merge_adapters(adapters, rank=sum(adapter.rank for adapter in adapters))
    assert set(merged.modules) == {path for adapter in adapters for path in adapter.modules}
    for path, lora in merged.modules.items():
        expected = dense_mean(adapters, path, shapes[path])
        size = max(np.linalg.norm(dense(a.modules[path])) for a in adapters if path in a.modules)
        assert lora.shape == shapes[path]
        assert_close(dense(lora), expected, size, 1e-5)


@settings(NUMERIC, max_examples=40)
@given(st.tuples(dims, dims), st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_linear_truncates_like_the_dense_svd(shape, n, rank, seed):
    shapes = {P: shape, Q: (7, 3)}
    adapters = adapters_of(np.random.default_rng(seed), n, shapes)
    merged = merge_adapters(adapters, rank=rank)
    for path, lora in merged.modules.items():
        mean = dense_mean(adapters, path, shapes[path])
        assert lora.rank <= rank
        # Near-equal singular values make the truncation itself arbitrary, its error never.
        error = np.linalg.norm(dense(lora) - mean)
        s = np.linalg.svd(mean, compute_uv=False)
        best = np.linalg.norm(s[rank:])
        assert error <= best + 1e-4 * np.linalg.norm(mean) + 1e-6
        if rank < len(s) and s[rank - 1] > 1.2 * s[rank] + 1e-6:
            assert_close(dense(lora), truncated(mean, rank), np.linalg.norm(s), 1e-4)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((1, 1), (1, 1)), ((1, 1), (3, 2)), ((1, 6), (4, 1)), ((5, 1), (1, 4)), ((2, 3), (8, 5))]
    + [((64, 48), (4, 8, 2)), ((33, 7), (16, 1, 1))],
    ids=str,
)
def test_odd_shapes_and_ranks(shape, ranks):
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(f"t{i}", {P: lora_of(rng, shape, rank, 2.0 - i)}) for i, rank in enumerate(ranks)
    ]
    mean = dense_mean(adapters, P, shape)
    for rank in (1, 2, max(ranks), 50):
        lora = merge_adapters(adapters, rank=rank).modules[P]
        assert lora.rank <= min(rank, sum(ranks))
        assert_close(dense(lora), truncated(mean, rank), np.linalg.norm(mean))


def test_default_rank_is_the_largest_of_the_inputs():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (20, 30), 2), Q: lora_of(rng, (20, 30), 5)})
    two = Adapter("b", {P: lora_of(rng, (20, 30), 3)})
    merged = merge_adapters([one, two])
    # Q has no more than 5 directions; P could use all 5 of the largest rank, and does.
    assert {path: lora.rank for path, lora in merged.modules.items()} == {P: 5, Q: 5}
    assert_close(dense(merged.modules[P]), dense_mean([one, two], P, (20, 30)), 1.0)


def test_a_missing_module_counts_as_zero():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (6, 5), 2)})
    others = [Adapter(name, {Q: lora_of(rng, (4, 4), 1)}) for name in "bc"]
    merged = merge_adapters([one, *others])
    assert_close(dense(merged.modules[P]), dense(one.modules[P]) / 3, 1.0)


def test_result_names_and_layout():
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(name, {P: lora_of(rng, (6, 5), 2, 3.0, mx.float16)}, "base") for name in ("b", "a")
    ]
    merged = merge_adapters(adapters)
    assert (merged.name, merged.sources, merged.base) == ("a+b", ("a", "b"), "base")
    lora = merged.modules[P]
    assert (lora.a.dtype, lora.b.dtype, lora.scale) == (mx.float32, mx.float32, 1.0)
    # Singular values are split evenly: both factors have the same norms, direction by direction.
    a, b = np.array(lora.a), np.array(lora.b)
    assert np.linalg.norm(a, axis=0) == pytest.approx(np.linalg.norm(b, axis=1), rel=1e-4)
    assert [adapter.name for adapter in adapters] == ["b", "a"]


# All methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_one_adapter_is_returned_bit_for_bit(method, dtype):
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (6, 5), 2, 3.0, dtype), Q: lora_of(rng, (3, 3), 1)}, "base")
    merged = merge_adapters([one], method, density=0.1)
    assert merged.digest == one.digest
    for path, lora in one.modules.items():
        same = merged.modules[path]
        assert (same.a.dtype, same.b.dtype, same.scale) == (lora.a.dtype, lora.b.dtype, lora.scale)
        assert mx.array_equal(same.a, lora.a) and mx.array_equal(same.b, lora.b)
    assert (merged.name, merged.base, merged.sources) == ("a", "base", ("a",))
    again = Adapter("ab", one.modules, None, ("a", "b"))
    assert merge_adapters([again]).sources == ("a", "b")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_order_and_repetition_change_no_bit(method, seed):
    rng = np.random.default_rng(seed)
    adapters = adapters_of(rng, 4, {P: (9, 7), Q: (5, 11)})
    merged = merge_adapters(adapters, method, rank=3)
    assert merge_adapters(adapters, method, rank=3).digest == merged.digest
    for _ in range(4):
        order = rng.permutation(4)
        again = merge_adapters([adapters[i] for i in order], method, rank=3)
        assert (again.digest, again.name, again.sources) == (
            merged.digest,
            merged.name,
            merged.sources,
        )


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter_among_equal_names(method):
    rng = np.random.default_rng(0)
    adapters = [Adapter("same", {P: lora_of(rng, (9, 7), 3)}) for _ in range(3)]
    digests = {merge_adapters(adapters[i:] + adapters[:i], method).digest for i in range(3)}
    assert len(digests) == 1


# At density 1 TIES trims nothing, and equal entries agree.
@pytest.mark.parametrize(("method", "density"), [("linear", 0.5), ("ties", 1.0)])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_adapters_merge_to_themselves(method, density, copies):
    rng = np.random.default_rng(0)
    modules = {
        P: lora_of(rng, (9, 7), 3, 4.0),
        Q: lora_of(rng, (1, 1), 2),
        R: lora_of(rng, (2, 8), 4),
    }
    merged = merge_adapters([Adapter(f"t{i}", modules) for i in range(copies)], method, density)
    for path, lora in modules.items():
        assert_close(dense(merged.modules[path]), dense(lora), np.linalg.norm(dense(lora)), 1e-5)


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims), st.integers(2, 4), st.integers(1, 6), st.sampled_from(sorted(METHODS))
)
def test_rank_is_at_most_what_was_asked(shape, n, rank, method):
    adapters = adapters_of(np.random.default_rng(n), n, {P: shape, Q: (4, 2)})
    merged = merge_adapters(adapters, method, rank=rank)
    assert merged.rank <= rank
    for path, lora in merged.modules.items():
        assert lora.a.shape[1] == lora.b.shape[0] == lora.rank
        assert lora.rank <= sum(a.modules[path].rank for a in adapters if path in a.modules)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_large_16_bit_factors_do_not_overflow(method, dtype):
    # Products of the stored values are far beyond float16's 65504.
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(name, {P: lora_of(rng, (12, 10), 4, 64.0, dtype, size=1e4)}) for name in "ab"
    ]
    merged = merge_adapters(adapters, method, density=1.0, rank=8)
    found = dense(merged.modules[P])
    assert np.isfinite(found).all() and np.abs(found).max() > 1e9
    if method == "linear":
        mean = dense_mean(adapters, P, (12, 10))
        assert_close(found, mean, np.linalg.norm(mean))


@pytest.mark.parametrize("method", METHODS)
def test_updates_of_zero(method):
    rng = np.random.default_rng(0)
    zero = LoRA(mx.ones((6, 2)), mx.zeros((2, 5)))
    merged = merge_adapters([Adapter("a", {P: zero}), Adapter("b", {P: zero})], method)
    assert np.array_equal(dense(merged.modules[P]), np.zeros((5, 6)))
    half = merge_adapters([Adapter("a", {P: zero}), Adapter("b", {P: lora_of(rng, (6, 5), 2)})])
    assert np.isfinite(dense(half.modules[P])).all()


def test_unknown_method():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (3, 3), 1)})
    for adapters in ([one], [one, one]):
        with pytest.raises(ConfigError, match="merge_method: 'dare' is unknown.*linear.*ties"):
            merge_adapters(adapters, "dare")


def test_lists_repeated_in_config_are_true():
    assert config.MERGE_METHODS == tuple(METHODS)
    assert config.STARTS == cluster.INITS


# TIES


def loop_ties(cores, density):
    """TIES entry by entry, as the paper writes it."""
    n, height, width = cores.shape
    keep = max(1, round(density * height * width))
    trimmed = []
    for core in cores:
        ranked = sorted((abs(float(x)) for x in core.ravel()), reverse=True)
        trimmed.append(
            [[float(x) if abs(x) >= ranked[keep - 1] else 0.0 for x in row] for row in core]
        )
    merged = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            values = [core[i][j] for core in trimmed]
            total = sum(values)
            agree = [x for x in values if x * total > 0]
            if agree:
                merged[i, j] = sum(agree) / len(agree)
    return merged


@settings(NUMERIC, max_examples=40)
@given(
    st.tuples(st.integers(1, 4), dims, dims),
    st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0]),
    st.integers(0, 10_000),
)
def test_ties_entry_by_entry(shape, density, seed):
    cores = np.random.default_rng(seed).normal(size=shape)
    before = cores.copy()
    assert ties(cores, density) == pytest.approx(loop_ties(cores, density))
    assert np.array_equal(cores, before)


def test_ties_by_hand():
    cores = np.array([[[4.0, -1.0, 2.0, 0.1]], [[-1.0, -3.0, 2.5, 0.2]], [[6.0, 5.0, 0.3, -0.4]]])
    # Half of each is kept: [4, ., 2, .], [., -3, 2.5, .], [6, 5, ., .]. Column 1: +5 outweighs -3.
    assert ties(cores, 0.5) == pytest.approx(np.array([[5.0, 5.0, 2.25, 0.0]]))
    # Sums of exactly zero elect no sign.
    assert ties(np.array([[[3.0]], [[-3.0]]]), 1.0).tolist() == [[0.0]]


def test_linear_core_is_the_mean():
    cores = np.arange(12.0).reshape(3, 2, 2)
    assert linear(cores, 0.1) == pytest.approx(cores.sum(axis=0) / 3)


@settings(NUMERIC, max_examples=20)
@given(st.tuples(dims, dims), st.integers(2, 4), st.sampled_from([0.2, 0.5]), st.integers(0, 1000))
def test_ties_merge_against_an_own_core_space(shape, n, density, seed):
    rng = np.random.default_rng(seed)
    # Sum of ranks at most the smaller dimension: the core is the same up to signs of its axes,
    # which TIES does not care about.
    shape = (shape[0] + 8, shape[1] + 8)
    adapters = [
        Adapter(
            f"t{i}", {P: lora_of(rng, shape, int(rng.integers(1, 3)), float(rng.uniform(1, 9)))}
        )
        for i in range(n)
    ]
    loras = [adapter.modules[P] for adapter in adapters]
    a = np.concatenate([np.array(lora.a, dtype=np.float64) for lora in loras], axis=1)
    b = np.concatenate([lora.scale * np.array(lora.b, dtype=np.float64) for lora in loras], axis=0)
    q_a, q_b = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    cores = np.stack([q_b.T @ dense(lora) @ q_a for lora in loras])
    expected = q_b @ loop_ties(np.where(abs(cores) < 1e-5, 0, cores), density) @ q_a.T
    found = merge_adapters(adapters, "ties", density, rank=100).modules[P]
    assert_close(dense(found), expected, np.linalg.norm(expected))


# The core space


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99)
)
def test_core_space_is_lossless(shape, ranks, seed):
    rng = np.random.default_rng(seed)
    factors = [
        (
            rng.normal(size=(shape[0], r)).astype(np.float32),
            rng.normal(size=(r, shape[1])).astype(np.float32),
        )
        for r in ranks
    ]
    q_a, q_b, cores = to_core(factors)
    assert len(cores) == len(ranks)
    assert q_a.shape[1] <= sum(ranks) and q_b.shape[1] <= sum(ranks)
    assert q_a.T @ q_a == pytest.approx(np.eye(q_a.shape[1]), abs=1e-5)
    for (a, b), core in zip(factors, cores):
        assert q_b @ core @ q_a.T == pytest.approx((a @ b).T, abs=1e-4)


def test_factorise_keeps_the_largest_directions():
    core = np.diag([1.0, 3.0, 2.0])
    a, b = factorise(core, np.eye(3), np.eye(3), 2)
    assert (a.shape, b.shape) == ((3, 2), (2, 3))
    assert (a @ b).T == pytest.approx(np.diag([0.0, 3.0, 2.0]))
    assert factorise(core, np.eye(3), np.eye(3), 9)[0].shape == (3, 3)


# Scale


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_scaled(dtype):
    rng = np.random.default_rng(0)
    one = Adapter(
        "a",
        {P: lora_of(rng, (6, 5), 2, 3.0, dtype), Q: lora_of(rng, (2, 3), 1, 0.5)},
        "base",
        ("x",),
    )
    digest = one.digest
    half = scaled(one, 0.5)
    for path, lora in one.modules.items():
        assert_close(dense(half.modules[path]), dense(lora) / 2, 1.0, 1e-6)
        assert half.modules[path].scale == 1.0
        assert half.modules[path].b.dtype == mx.float32
        assert mx.array_equal(half.modules[path].a, lora.a)
    assert (half.name, half.base, half.sources) == ("a", "base", ("x",))
    assert one.digest == digest != half.digest
    assert_close(dense(scaled(one, 1.0).modules[P]), dense(one.modules[P]), 1.0, 1e-6)


def test_scaled_16_bit_factors_do_not_overflow():
    lora = LoRA(mx.full((2, 1), 4e4, mx.float16), mx.full((1, 2), 4e4, mx.float16), 2.0)
    b = scaled(Adapter("a", {P: lora}), 4.0).modules[P].b
    assert np.array(b) == pytest.approx(np.full((1, 2), 3.2e5), rel=1e-3)
