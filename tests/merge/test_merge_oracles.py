"""Every merge method against a dense one in float64, written from its paper."""

import itertools
import zlib

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from d2c_mlx_methods.spectral import iso_c, iso_cts, pico
from d2c_mlx_methods.wudi import wudi
from helpers.loras import (
    NUMERIC,
    P,
    Q,
    R,
    adapters_of,
    as_space,
    assert_close,
    assert_merges,
    counts,
    deltas,
    dense,
    dense_grams,
    dense_mean,
    dims,
    inputs_of,
    lora_of,
    mixed_ranks,
    seeds,
    truncated,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import to_core
from d2c_mlx.merge.combine import tsv
from d2c_mlx.merge.methods import merge_adapters


def own_space(adapters):
    """`(q_a, q_b, dense dW in these coordinates)`, from float64 stacks."""
    loras = [adapter.modules[P] for adapter in adapters]
    a = np.concatenate([np.array(lora.a, dtype=np.float64) for lora in loras], axis=1)
    b = np.concatenate([lora.scale * np.array(lora.b, dtype=np.float64) for lora in loras], axis=0)
    q_a, q_b = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    cores = np.stack([q_b.T @ dense(lora) @ q_a for lora in loras])
    # What is zero in exact arithmetic has no sign.
    return q_a, q_b, np.where(abs(cores) < 1e-5, 0, cores)


# Entry by entry


def loop_elect(trimmed, choose):
    """`choose` from the values of every entry that have the sign of their sum."""
    merged = np.zeros(trimmed[0].shape)
    for i, j in np.ndindex(*merged.shape):
        values = [float(core[i, j]) for core in trimmed]
        agree = [x for x in values if x * sum(values) > 0]
        if agree:
            merged[i, j] = choose(agree)
    return merged


def mean(values):
    return sum(values) / len(values)


def loop_trim(core, density):
    keep = max(1, round(density * core.size))
    ranked = sorted((abs(float(x)) for x in core.ravel()), reverse=True)
    return np.array([[x if abs(x) >= ranked[keep - 1] else 0.0 for x in row] for row in core])


def loop_ties(cores, density):
    return loop_elect([loop_trim(core, density) for core in cores], mean)


def loop_drop(cores, density, seed):
    """One draw after the other."""
    rng = np.random.default_rng(seed)
    dropped = np.zeros(cores.shape)
    for index in np.ndindex(*cores.shape):
        if rng.random() < density:
            dropped[index] = cores[index] / density
    return dropped


densities = st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0])


@settings(NUMERIC, max_examples=20)
@given(st.tuples(dims, dims), counts, st.sampled_from([0.2, 0.5]), seeds)
def test_entries_in_an_own_core_space(shape, n, density, seed):
    # Sum of ranks at most the smaller dimension: the core is the same up to signs of its axes,
    # which no entry-wise method cares about.
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    q_a, q_b, cores = own_space(adapters)
    dropped = loop_drop(cores, density, zlib.crc32(f"{seed} {P}".encode()))
    for method, core in {
        "ties": loop_ties(cores, density),
        "dare-linear": sum(dropped) / n,
        "dare-ties": loop_elect(dropped, mean),
        "emr": loop_elect(cores, lambda x: max(x, key=abs)),
    }.items():
        assert_merges(adapters, method, q_b @ core @ q_a.T, density=density, seed=seed)


@pytest.mark.parametrize("method", ["ties", "dare-ties", "emr", "knots", "pico", "ctm"])
def test_where_updates_cancel_rounding_elects_no_sign(method):
    lora = lora_of(np.random.default_rng(0), (40, 30), 4)
    pair = [Adapter("a", {P: lora}), Adapter("b", {P: LoRA(lora.a, -lora.b, lora.scale)})]
    merged = merge_adapters(pair, method, density=1.0)
    assert np.linalg.norm(dense(merged.modules[P])) < 1e-5 * np.linalg.norm(dense(lora))


# Singular vectors


def svd(matrix, n):
    u, s, vt = np.linalg.svd(matrix)
    return u[:, :n], s[:n], vt[:n]


def polar(columns):
    """The nearest orthonormal matrix by Newton's iteration for the polar factor."""
    x = columns / np.linalg.norm(columns, 2)
    for _ in range(60):
        x = 1.5 * x - 0.5 * x @ x.T @ x
    return x


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), counts, st.integers(1, 3), seeds)
def test_tsv(shape, n, per_task, seed):
    rng = np.random.default_rng(seed)
    shape = (shape[0] + 12, shape[1] + 12)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, shape, 3 + i % 2, 1 + i)}) for i in range(n)]
    triplets = [svd(delta, per_task) for delta in deltas(adapters)]
    u = polar(np.concatenate([u for u, _, _ in triplets], axis=1))
    v = polar(np.concatenate([vt.T for _, _, vt in triplets], axis=1))
    expected = u @ np.diag(np.concatenate([s for _, s, _ in triplets])) @ v.T
    assert_merges(adapters, "tsv", expected, 2e-4, rank=per_task * n)
    # Rounded up where it does not divide, then truncated.
    fewer = truncated(expected, per_task * n - 1)
    assert_merges(adapters, "tsv", fewer, 2e-4, rank=per_task * n - 1)


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), counts, st.integers(1, 9), seeds)
def test_iso_c(shape, n, rank, seed):
    adapters = mixed_ranks(n, shape, seed)
    total = sum(deltas(adapters))
    rank = min(rank, np.linalg.matrix_rank(total, tol=1e-4))
    u, s, vt = svd(total, rank)
    assert_merges(adapters, "iso-c", s.mean() * u @ vt, 1e-3, rank=int(rank))


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), st.integers(2, 3), st.integers(1, 14), seeds)
def test_iso_cts(shape, n, rank, seed):
    rng = np.random.default_rng(seed)
    shape = (shape[0] + 16, shape[1] + 16)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, shape, 5)}) for i in range(n)]
    found, tasks = merge_adapters(adapters, "iso-cts", rank=rank), deltas(adapters)
    size = min(rank, 5 * n)
    own = round((size - int(0.8 * size)) / n)
    u, s, vt = svd(sum(tasks), size - own * n)
    left, values, right = [u], [s], [vt.T]
    for delta in tasks:
        rest = svd((np.eye(shape[1]) - u @ u.T) @ delta, own)
        left, values, right = [*left, rest[0]], [*values, rest[1]], [*right, rest[2].T]
    expected = np.concatenate(values).mean() * (
        polar(np.concatenate(left, axis=1)) @ polar(np.concatenate(right, axis=1)).T
    )
    assert_close(dense(found.modules[P]), expected, np.linalg.norm(expected), 1e-3)


@settings(NUMERIC, max_examples=30)
@given(st.tuples(dims, dims), counts, st.sampled_from([0.2, 0.5, 1.0]), st.booleans(), seeds)
def test_knots(shape, n, density, same_outputs, seed):
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    if same_outputs:  # Fewer common left singular vectors than the sum of ranks.
        b = mx.array(np.random.default_rng(seed).normal(size=(2, shape[1] + 8)))
        loras = [adapter.modules[P] for adapter in adapters]
        loras = [LoRA(lora.a, b[: lora.rank], lora.scale) for lora in loras]
        adapters = [Adapter(one.name, {P: lora}) for one, lora in zip(adapters, loras)]
    q_a, _, _ = own_space(adapters)
    side_by_side = np.concatenate(deltas(adapters), axis=1)
    u, s, vt = np.linalg.svd(side_by_side, full_matrices=False)
    k = np.linalg.matrix_rank(side_by_side, tol=1e-4)
    parts = np.split(np.diag(s[:k]) @ vt[:k], n, axis=1)
    cores = np.stack([part @ q_a for part in parts])
    cores[abs(cores) <= 1e-6 * abs(cores).max()] = 0
    expected = u[:, :k] @ loop_ties(cores, density) @ q_a.T
    assert_merges(adapters, "knots", expected, 1e-3, density=density)


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), counts, st.integers(1, 9), seeds)
def test_pico(shape, n, rank, seed):
    adapters = mixed_ranks(n, shape, seed)
    # Factors whose A has orthonormal rows, as `dW = B A`.
    q, r = zip(*(np.linalg.qr(np.array(one.modules[P].a, dtype=float)) for one in adapters))
    b = [one.modules[P].scale * np.array(one.modules[P].b, dtype=float).T @ x.T
         for one, x in zip(adapters, r)]  # fmt: skip
    u, s, _ = np.linalg.svd(np.concatenate(b, axis=1), full_matrices=False)
    alpha = 1 / (1 + (n - 1) * s**2 / (s**2).sum())
    calibrate = np.eye(len(u)) + u @ np.diag(alpha - 1) @ u.T
    merged = sum(calibrate @ one @ a.T for one, a in zip(b, q))
    norms = [np.linalg.norm(one @ a.T) for one, a in zip(b, q)]
    merged *= np.mean(norms) / np.linalg.norm(merged)
    assert_merges(adapters, "pico", truncated(merged, rank), 1e-3, rank=rank)


def loop_tucker(tensor, rank):
    """Tucker-2 of `(T, out, in)` by alternating SVDs of its unfoldings; (U, V)."""

    def leading(unfolded):
        u, s, _ = np.linalg.svd(unfolded, full_matrices=False)
        return u[:, :rank], (s[:rank] ** 2).sum()

    (v, _), before = leading(np.concatenate(tensor.transpose(0, 2, 1), axis=1)), 0.0
    for _ in range(50):
        u, _ = leading(np.concatenate(tensor @ v, axis=1))
        v, energy = leading(np.concatenate(tensor.transpose(0, 2, 1) @ u, axis=1))
        if energy - before <= 1e-6 * energy:
            break
        before = energy
    return u, v


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), counts, st.integers(1, 5), st.sampled_from([0.2, 1.0]), seeds)
def test_ctm(shape, n, rank, density, seed):
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    tasks = np.stack(deltas(adapters))
    # There are no more directions than columns.
    rank = min(rank, sum(one.modules[P].rank for one in adapters))
    u, v = loop_tucker(tasks / np.linalg.norm(tasks, axis=(1, 2), keepdims=True), rank)
    cores = u.T @ tasks @ v
    cores[abs(cores) <= 1e-6 * abs(cores).max()] = 0
    expected = u @ loop_ties(cores, density) @ v.T
    assert_merges(adapters, "ctm", expected, 1e-3, rank=rank, density=density)


@pytest.mark.parametrize("merge", [tsv, iso_c, iso_cts, lambda space, _: pico(space)])
def test_tasks_without_the_module_take_no_directions(merge):
    rng = np.random.default_rng(0)
    factors = [(rng.normal(size=(40, 8)), rng.normal(size=(8, 30))) for _ in range(2)]
    empty = (np.zeros((40, 0)), np.zeros((0, 30)))
    alone, among = to_core(factors), to_core([factors[0], empty, empty, factors[1], empty])
    found, expected = (x.q_b @ merge(x, 14) @ x.q_a.T for x in (among, alone))
    assert np.allclose(found, expected, atol=1e-9) and abs(found).max() > 0.1


def test_a_polar_factor_of_parallel_vectors_is_no_noise():
    """TSV of two tasks with one common direction: what separates the copies is only rounding."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 8))
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    noise = 1e-7 * rng.normal(size=(2, 8, 8))
    cores = as_space((3 * np.outer(u, v) + noise).astype(np.float32))
    assert tsv(cores, 2) == pytest.approx(3 * np.outer(u, v), abs=1e-5)
    assert iso_cts(cores, 8) == pytest.approx(6 * np.outer(u, v), abs=1e-5)


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


def test_default_rank_is_the_largest_of_the_inputs():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (20, 30), 2), Q: lora_of(rng, (20, 30), 5)})
    two = Adapter("b", {P: lora_of(rng, (20, 30), 3)})
    merged = merge_adapters([one, two])
    # Q has no more than 5 directions; P could use all 5 of the largest rank, and does.
    assert {path: lora.rank for path, lora in merged.modules.items()} == {P: 5, Q: 5}
    assert_close(dense(merged.modules[P]), dense_mean([one, two], P, (20, 30)), 1.0)


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


def units_of(rng, centres, noise, ranks, shape):
    """Adapters made of units near given centres, in a random order, scales anywhere."""
    adapters = []
    for i, picks in enumerate(ranks):
        picks = rng.permutation(picks)
        near = centres[picks] * (1 + noise * rng.normal(size=(len(picks), sum(shape))))
        a, b = near[:, : shape[0]].T, near[:, shape[0] :]
        gauge, scale = rng.uniform(0.2, 5, size=len(picks)), float(rng.uniform(0.1, 9))
        lora = LoRA(mx.array(a * gauge), mx.array(b / gauge[:, None] / scale), scale)
        adapters.append(Adapter(f"t{i}", {P: lora}))
    return adapters


@pytest.mark.parametrize("seed", range(5))
def test_lego_finds_planted_units(seed):
    rng = np.random.default_rng(seed)
    shape = (20, 16)
    centres = 3 * rng.normal(size=(3, sum(shape)))
    picks = [[0, 1, 2], [2, 0], [1, 2, 0], [1]]
    adapters = units_of(rng, centres, 0.05, picks, shape)
    # The oracle knows the clusters: units nearest to the same centre, sign and all.
    members = {0: [], 1: [], 2: []}
    for adapter in adapters:
        a, b = (np.array(x, dtype=np.float64) for x in adapter.modules[P].factors())
        for column, row in zip(a.T, b):
            balance = np.sqrt(np.linalg.norm(row) / np.linalg.norm(column))
            unit = np.concatenate([column * balance, row / balance])
            nearest = min(members, key=lambda k: np.linalg.norm(unit - centres[k]))
            members[nearest].append(unit)
    expected = np.zeros(shape[::-1])
    for units in members.values():
        centroid = sum(units) / len(units)
        centroid *= np.mean([np.linalg.norm(u) for u in units]) / np.linalg.norm(centroid)
        expected += np.outer(centroid[shape[0] :], centroid[: shape[0]])
    mean_rank = np.mean([len(one) for one in picks])
    expected *= np.sqrt(mean_rank / 3)
    assert_merges(adapters, "lego", expected, 1e-4, rank=3)


def test_lego_leaves_distinct_units_apart():
    rng = np.random.default_rng(0)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, (9, 8), 2)}) for i in range(3)]
    merged = merge_adapters(adapters, "lego", rank=10).modules[P]
    assert merged.rank == 6
    assert_close(dense(merged), np.sqrt(2 / 6) * sum(deltas(adapters)), 10.0)
    again = merge_adapters([*adapters, Adapter("t3", adapters[0].modules)], "lego", rank=10)
    assert again.modules[P].rank == 6


@settings(NUMERIC, max_examples=25)
@given(st.tuples(dims, dims), counts, seeds)
def test_concat_and_factor_linear(shape, n, seed):
    adapters = adapters_of(np.random.default_rng(seed), n, {P: shape, Q: (3, 4)})
    here = [adapter for adapter in adapters if P in adapter.modules]
    weights = np.random.default_rng(seed).uniform(-2, 2, size=n)
    merged = merge_adapters(adapters, "concat", weights=list(weights)).modules[P]
    pairs = [(w, a.modules[P]) for w, a in zip(weights, adapters) if P in a.modules]
    expected = sum(w * dense(lora) for w, lora in pairs)
    assert_close(dense(merged), expected, max(np.linalg.norm(dense(x)) for _, x in pairs), 1e-6)
    assert merged.rank == sum(adapter.modules[P].rank for adapter in here)
    columns = [np.array(lora.a.astype(mx.float32)) for _, lora in pairs]
    assert np.array_equal(np.array(merged.a), np.concatenate(columns, axis=1))

    rank = max(lora.rank for _, lora in pairs)
    a, b = np.zeros((shape[0], rank)), np.zeros((rank, shape[1]))
    for (w, lora), j in itertools.product(pairs, range(rank)):
        if j < lora.rank:
            root = np.sqrt(abs(w * lora.scale))
            a[:, j] += np.sign(w) * root * np.array(lora.a.astype(mx.float32))[:, j]
            b[j] += root * np.array(lora.b.astype(mx.float32))[j]
    expected = (a @ b).T
    found = merge_adapters(adapters, "factor-linear", weights=list(weights)).modules[P]
    size = np.linalg.norm(a) * np.linalg.norm(b)
    assert_close(dense(found), expected, size, 1e-5)
    small = merge_adapters(adapters, "factor-linear", weights=list(weights), rank=1).modules[P]
    assert small.rank == 1
    best = np.linalg.norm(expected - truncated(expected, 1))
    assert np.linalg.norm(dense(small) - expected) <= best + 1e-5 * size


@settings(NUMERIC, max_examples=30)
@given(st.tuples(dims, dims), counts, seeds)
def test_wudi_is_the_least_squares_solution(shape, n, seed):
    adapters = mixed_ranks(n, shape, seed)
    tasks = [delta for delta in deltas(adapters) if np.linalg.norm(delta)]
    # Transposed: t_i t^T = t_i t_i^T for all i at once, each row divided by |t_i|.
    left = np.concatenate([t / np.linalg.norm(t) for t in tasks])
    right = np.concatenate([t @ t.T / np.linalg.norm(t) for t in tasks])
    s = np.linalg.svd(left, compute_uv=False)
    assume(not ((s > 1e-6) & (s < 1e-3)).any())  # What float32 factors hardly hold.
    expected = np.linalg.lstsq(left, right, rcond=1e-5)[0].T
    assert_merges(adapters, "wudi", expected, 1e-3)


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
def test_wudi_tells_similar_inputs_apart(angle):
    """Two tasks of one input each: the result does to it what the task did."""
    inputs = np.array([[1.0, 0.0, 0.0], [np.cos(angle), np.sin(angle), 0.0]])
    outputs = np.array([[2.0, -1.0], [0.5, 3.0]])
    found = wudi(as_space(np.stack([np.outer(y, x) for x, y in zip(inputs, outputs)])))
    assert found @ inputs.T == pytest.approx(outputs.T, rel=1e-4)


def dense_regmean(tasks, inputs, off_diagonal, ridge):
    """The normal equations with every matrix formed."""
    grams = dense_grams(inputs, off_diagonal, ridge)
    right = sum(gram @ task.T for gram, task in zip(grams, tasks))
    return np.linalg.solve(sum(grams), right).T


@settings(NUMERIC, max_examples=30)
@given(st.tuples(dims, dims), counts, st.sampled_from([1, 2, 30]), seeds)
def test_regmean_is_the_dense_one(shape, n, n_tokens, seed):
    adapters = mixed_ranks(n, shape, seed)
    inputs = inputs_of(adapters, n_tokens)
    expected = dense_regmean(deltas(adapters), inputs[P], 0.9, 1e-6)
    assert_merges(adapters, "regmean", expected, 1e-4, activations=inputs)
    # In a rank: the nearest where the distance is that of the outputs.
    rank = 1 + seed % 3
    found = merge_adapters(adapters, "regmean", rank=rank, activations=inputs).modules[P]
    assert found.rank <= rank
    root = scipy.linalg.sqrtm(sum(dense_grams(inputs[P], 0.9, 1e-6))).real
    best = truncated(expected @ root, rank)
    lost, least = (np.linalg.norm(one - expected @ root) for one in (dense(found) @ root, best))
    assert lost <= least + 1e-4 * np.linalg.norm(expected @ root) + 1e-5


def test_regmean_without_data_is_the_mean():
    adapters = mixed_ranks(3, (7, 5), 0)
    for inputs in (np.zeros((4, 7)), np.zeros((0, 7))):
        activations = {P: [inputs] * 3}
        assert_merges(adapters, "regmean", sum(deltas(adapters)) / 3, activations=activations)


def test_regmean_takes_a_square_root_of_a_gram_matrix():
    adapters = mixed_ranks(3, (7, 5), 1)
    inputs = inputs_of(adapters, 20)
    roots = {P: [scipy.linalg.sqrtm(x.T @ x).real for x in inputs[P]]}
    found = merge_adapters(adapters, "regmean", rank=100, activations=roots).modules[P]
    expected = merge_adapters(adapters, "regmean", rank=100, activations=inputs).modules[P]
    assert_close(dense(found), dense(expected), np.linalg.norm(dense(expected)), 1e-5)


def test_regmean_of_modules_with_the_same_inputs_is_that_of_each():
    adapters = adapters_of(np.random.default_rng(0), 4, {P: (9, 7), Q: (9, 5), R: (6, 9)})
    inputs = inputs_of(adapters)
    shared = {**inputs, Q: inputs[P]}
    apart = {**shared, Q: [x.copy() for x in inputs[P]]}
    together, alone, other = (
        merge_adapters(adapters, "regmean", activations=one) for one in (shared, apart, inputs)
    )
    assert together.digest == alone.digest
    assert together.digest != other.digest
