"""Merges against dense ones in float64, written from their papers."""

import zlib
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_methods.spectral import iso_c, iso_cts, pico
from d2c_mlx_methods.wudi import wudi
from helpers.loras import (
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
    dense_fit,
    dense_mean,
    inputs_of,
    lora_of,
    mixed_ranks,
    numeric,
    seeds,
    shapes,
    truncated,
)
from hypothesis import assume
from hypothesis import strategies as st
from scipy.linalg import polar

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import to_core
from d2c_mlx.merge.combine import tsv
from d2c_mlx.merge.methods import merge_adapters


def own_space(adapters):
    """`(q_a, q_b, dense dW in these coordinates)`, from float64 stacks."""
    loras = [adapter.modules[P] for adapter in adapters]
    a = np.concatenate([np.array(lora.a, np.float64) for lora in loras], axis=1)
    b = np.concatenate([lora.scale * np.array(lora.b, np.float64) for lora in loras])
    q_a, q_b = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    cores = np.stack([q_b.T @ dense(lora) @ q_a for lora in loras])
    # Entries that are zero in exact arithmetic have no sign.
    return q_a, q_b, np.where(abs(cores) < 1e-5, 0, cores)


def elect(trimmed, choose):
    """`choose` from the values of every entry that have the sign of their sum."""
    merged = np.zeros(trimmed[0].shape)
    for index in np.ndindex(*merged.shape):
        values = [float(core[index]) for core in trimmed]
        agree = [x for x in values if x * sum(values) > 0]
        merged[index] = choose(agree) if agree else 0
    return merged


def loop_ties(cores, density):
    keep = max(1, round(density * cores[0].size))
    least = [sorted(abs(core).ravel())[-keep] for core in cores]
    trimmed = [np.where(abs(core) >= x, core, 0) for core, x in zip(cores, least)]
    return elect(trimmed, np.mean)


def loop_drop(cores, density, seed):
    """One draw after the other."""
    rng = np.random.default_rng(seed)
    kept = [rng.random() < density for _ in range(cores.size)]
    return np.where(np.reshape(kept, cores.shape), cores / density, 0)


@numeric(shapes, counts, st.sampled_from([0.2, 0.5]), seeds, n=20)
def test_entries_in_an_own_core_space(shape, n, density, seed):
    # Sum of ranks at most the smaller dimension: the core is the same up to signs of its axes,
    # which no entry-wise method cares about.
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    q_a, q_b, cores = own_space(adapters)
    dropped = loop_drop(cores, density, zlib.crc32(f"{seed} {P}".encode()))
    for method, core in {
        "ties": loop_ties(cores, density),
        "dare-linear": sum(dropped) / n,
        "dare-ties": elect(dropped, np.mean),
        "emr": elect(cores, lambda x: max(x, key=abs)),
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


@numeric(shapes, counts, st.integers(1, 3), seeds)
def test_tsv(shape, n, per_task, seed):
    rng, shape = np.random.default_rng(seed), (shape[0] + 12, shape[1] + 12)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, shape, 3 + i % 2, 1 + i)}) for i in range(n)]
    u, s, vt = zip(*(svd(delta, per_task) for delta in deltas(adapters)))
    left, right = polar(np.concatenate(u, axis=1))[0], polar(np.concatenate(vt).T)[0]
    expected = left * np.concatenate(s) @ right.T
    assert_merges(adapters, "tsv", expected, 2e-4, rank=per_task * n)
    # Rounded up where it does not divide, then truncated.
    fewer = truncated(expected, per_task * n - 1)
    assert_merges(adapters, "tsv", fewer, 2e-4, rank=per_task * n - 1)


@numeric(shapes, counts, st.integers(1, 9), seeds)
def test_iso_c(shape, n, rank, seed):
    adapters = mixed_ranks(n, shape, seed)
    total = sum(deltas(adapters))
    rank = min(rank, np.linalg.matrix_rank(total, tol=1e-4))
    u, s, vt = svd(total, rank)
    assert_merges(adapters, "iso-c", s.mean() * u @ vt, 1e-3, rank=int(rank))


@numeric(shapes, st.integers(2, 3), st.integers(1, 14), seeds)
def test_iso_cts(shape, n, rank, seed):
    rng, shape = np.random.default_rng(seed), (shape[0] + 16, shape[1] + 16)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, shape, 5)}) for i in range(n)]
    tasks, size = deltas(adapters), min(rank, 5 * n)
    own = round((size - int(0.8 * size)) / n)
    triplets = [svd(sum(tasks), size - own * n)]
    common = triplets[0][0]
    triplets += [svd((np.eye(shape[1]) - common @ common.T) @ delta, own) for delta in tasks]
    u, s, vt = zip(*triplets)
    left, right = polar(np.concatenate(u, axis=1))[0], polar(np.concatenate(vt).T)[0]
    expected = np.concatenate(s).mean() * left @ right.T
    assert_merges(adapters, "iso-cts", expected, 1e-3, rank=rank)


@numeric(shapes, counts, st.sampled_from([0.2, 0.5, 1.0]), st.booleans(), seeds, n=30)
def test_knots(shape, n, density, same_outputs, seed):
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    if same_outputs:  # Fewer common left singular vectors than the sum of ranks.
        b = mx.array(np.random.default_rng(seed).normal(size=(2, shape[1] + 8)))
        loras = [replace(x.modules[P], b=b[: x.modules[P].rank]) for x in adapters]
        adapters = [Adapter(x.name, {P: lora}) for x, lora in zip(adapters, loras)]
    q_a, _, _ = own_space(adapters)
    side_by_side = np.concatenate(deltas(adapters), axis=1)
    u, s, vt = np.linalg.svd(side_by_side, full_matrices=False)
    k = np.linalg.matrix_rank(side_by_side, tol=1e-4)
    parts = np.split(np.diag(s[:k]) @ vt[:k], n, axis=1)
    cores = np.stack([part @ q_a for part in parts])
    cores[abs(cores) <= 1e-6 * abs(cores).max()] = 0
    expected = u[:, :k] @ loop_ties(cores, density) @ q_a.T
    assert_merges(adapters, "knots", expected, 1e-3, density=density)


@numeric(shapes, counts, st.integers(1, 9), seeds)
def test_pico(shape, n, rank, seed):
    adapters = mixed_ranks(n, shape, seed)
    tasks, sides = deltas(adapters), []
    for adapter, delta in zip(adapters, tasks):  # dW = B A, where A has orthonormal rows
        sides.append(delta @ np.linalg.qr(np.array(adapter.modules[P].a, dtype=float))[0])
    u, s, _ = np.linalg.svd(np.concatenate(sides, axis=1), full_matrices=False)
    alpha = 1 / (1 + (n - 1) * s**2 / (s**2).sum())
    merged = (np.eye(len(u)) + u @ np.diag(alpha - 1) @ u.T) @ sum(tasks)
    merged *= np.mean([np.linalg.norm(delta) for delta in tasks]) / np.linalg.norm(merged)
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


@numeric(shapes, counts, st.integers(1, 5), st.sampled_from([0.2, 1.0]), seeds)
def test_ctm(shape, n, rank, density, seed):
    adapters = mixed_ranks(n, (shape[0] + 8, shape[1] + 8), seed)
    tasks = np.stack(deltas(adapters))
    # There are no more directions than columns.
    rank = min(rank, sum(adapter.rank for adapter in adapters))
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
    with_empty, expected = (x.q_b @ merge(x, 14) @ x.q_a.T for x in (among, alone))
    assert np.allclose(with_empty, expected, atol=1e-9) and abs(expected).max() > 0.1


def test_a_polar_factor_of_parallel_vectors_is_no_noise():
    """TSV of two tasks with one common direction: what separates the copies is only rounding."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 8))
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    noise = 1e-7 * rng.normal(size=(2, 8, 8))
    cores = as_space((3 * np.outer(u, v) + noise).astype(np.float32))
    assert tsv(cores, 2) == pytest.approx(3 * np.outer(u, v), abs=1e-5)
    assert iso_cts(cores, 8) == pytest.approx(6 * np.outer(u, v), abs=1e-5)


# Factors, and what modules read


@numeric(shapes, st.integers(2, 5), st.integers(1, 20), seeds, n=60)
def test_linear_truncates_the_dense_mean(shape, n, rank, seed):
    sizes = {P: shape, Q: (7, 3), R: (1, 1)}
    adapters = adapters_of(np.random.default_rng(seed), n, sizes)
    merged = merge_adapters(adapters, rank=rank)
    assert set(merged.modules) == {path for adapter in adapters for path in adapter.modules}
    for path, lora in merged.modules.items():
        mean = dense_mean(adapters, path, sizes[path])
        size = max(np.linalg.norm(dense(a.modules[path])) for a in adapters if path in a.modules)
        assert lora.shape == sizes[path] and lora.rank <= rank
        # Near-equal singular values make the truncation itself arbitrary, its error never.
        least = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[rank:])
        assert np.linalg.norm(dense(lora) - mean) <= least + 1e-5 * size


def test_default_rank_names_and_layout():
    rng = np.random.default_rng(0)
    first, second = lora_of(rng, (20, 30), 2), lora_of(rng, (20, 30), 3, 3.0, mx.float16)
    five = lora_of(rng, (20, 30), 5)
    adapters = [Adapter("b", {P: second}, "base"), Adapter("a", {P: first, Q: five}, "base")]
    merged = merge_adapters(adapters)
    assert (merged.name, merged.sources, merged.base) == ("a+b", ("a", "b"), "base")
    # Q has no more than 5 directions; P could use all 5 of the largest rank, and does.
    assert {path: lora.rank for path, lora in merged.modules.items()} == {P: 5, Q: 5}
    lora = merged.modules[P]
    assert (lora.a.dtype, lora.b.dtype, lora.scale) == (mx.float32, mx.float32, 1.0)
    # Singular values are split evenly: both factors have the same norms, direction by direction.
    a, b = np.array(lora.a), np.array(lora.b)
    assert np.linalg.norm(a, axis=0) == pytest.approx(np.linalg.norm(b, axis=1), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_lego_finds_planted_units_and_leaves_distinct_ones_apart(seed):
    """Units near given centres, in a random order, scales anywhere; the oracle knows the centre."""
    rng, shape = np.random.default_rng(seed), (20, 16)
    centres = 3 * rng.normal(size=(3, sum(shape)))
    picks, members, adapters = [[0, 1, 2], [2, 0], [1, 2, 0], [1]], {0: [], 1: [], 2: []}, []
    for i, pick in enumerate(map(rng.permutation, picks)):
        near = centres[pick] * (1 + 0.05 * rng.normal(size=(len(pick), sum(shape))))
        a, b = near[:, : shape[0]].T, near[:, shape[0] :]
        gauge, scale = rng.uniform(0.2, 5, size=len(pick)), float(rng.uniform(0.1, 9))
        lora = LoRA(mx.array(a * gauge), mx.array(b / gauge[:, None] / scale), scale)
        adapters.append(Adapter(f"t{i}", {P: lora}))
        for k, column, row in zip(pick, a.T, b):
            balance = np.sqrt(np.linalg.norm(row) / np.linalg.norm(column))
            members[k].append(np.concatenate([column * balance, row / balance]))
    expected = np.zeros(shape[::-1])
    for units in members.values():
        centroid = sum(units) / len(units)
        centroid *= np.mean([np.linalg.norm(u) for u in units]) / np.linalg.norm(centroid)
        expected += np.outer(centroid[shape[0] :], centroid[: shape[0]])
    expected *= np.sqrt(np.mean([len(pick) for pick in picks]) / 3)
    assert_merges(adapters, "lego", expected, 1e-4, rank=3)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, (9, 8), 2)}) for i in range(3)]
    assert_merges(adapters, "lego", np.sqrt(2 / 6) * sum(deltas(adapters)), rank=10)
    again = merge_adapters([*adapters, Adapter("t3", adapters[0].modules)], "lego", rank=10)
    assert again.modules[P].rank == 6


@numeric(shapes, counts, seeds)
def test_factor_linear_pads_ranks(shape, n, seed):
    adapters = mixed_ranks(n, shape, seed, 4)
    weights = np.random.default_rng(seed).uniform(-2, 2, size=n)
    loras = [adapter.modules[P] for adapter in adapters]
    rank = max(lora.rank for lora in loras)
    a, b = np.zeros((shape[0], rank)), np.zeros((rank, shape[1]))
    for w, lora in zip(weights, loras):
        root = np.sqrt(abs(w * lora.scale))
        a[:, : lora.rank] += np.sign(w) * root * np.array(lora.a)
        b[: lora.rank] += root * np.array(lora.b)
    expected, size = (a @ b).T, np.linalg.norm(a) * np.linalg.norm(b)
    whole, small = (
        merge_adapters(adapters, "factor-linear", weights=list(weights), rank=r).modules[P]
        for r in (None, 1)
    )
    assert_close(dense(whole), expected, size, 1e-5)
    least = np.linalg.norm(expected - truncated(expected, 1))
    assert small.rank == 1 and np.linalg.norm(dense(small) - expected) <= least + 1e-5 * size


@numeric(shapes, counts, seeds, n=30)
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
    merged = wudi(as_space(np.stack([np.outer(y, x) for x, y in zip(inputs, outputs)])))
    assert merged @ inputs.T == pytest.approx(outputs.T, rel=1e-4)


@numeric(shapes, counts, st.sampled_from([1, 2, 30]), seeds, n=30)
def test_regmean_is_the_dense_one(shape, n, n_tokens, seed):
    adapters = mixed_ranks(n, shape, seed)
    # Not as many rows of every task.
    inputs = {P: [x[i:] for i, x in enumerate(inputs_of(adapters, n_tokens + 3)[P])]}
    # The normal equations with every matrix formed.
    factors = [(delta.T, np.eye(shape[1])) for delta in deltas(adapters)]
    root, whole = dense_fit(factors, inputs[P])
    expected = np.linalg.solve(root, whole).T
    assert_merges(adapters, "regmean", expected, 1e-4, activations=inputs)
    # In a rank: the nearest where the distance is that of the outputs.
    rank = 1 + seed % 3
    merged = merge_adapters(adapters, "regmean", rank=rank, activations=inputs).modules[P]
    least = np.linalg.norm(truncated(whole, rank) - whole)
    assert merged.rank <= rank
    assert np.linalg.norm(root @ dense(merged).T - whole) <= least + 1e-4 * np.linalg.norm(whole)


def test_regmean_without_data_and_with_the_same_inputs_of_two_modules():
    adapters = mixed_ranks(3, (7, 5), 0)
    for nothing in (np.zeros((4, 7)), np.zeros((0, 7))):
        mean = sum(deltas(adapters)) / 3
        assert_merges(adapters, "regmean", mean, activations={P: [nothing] * 3})
    adapters = adapters_of(np.random.default_rng(0), 4, {P: (9, 7), Q: (9, 5), R: (6, 9)})
    inputs = inputs_of(adapters)
    shared, apart = ({**inputs, Q: x} for x in (inputs[P], [x.copy() for x in inputs[P]]))
    together, alone, other = (
        merge_adapters(adapters, "regmean", activations=read).digest
        for read in (shared, apart, inputs)
    )
    assert together == alone != other
