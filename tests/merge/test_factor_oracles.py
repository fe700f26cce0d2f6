"""Merges of factors and of what modules read, against dense ones in float64 and PEFT's own."""

import mlx.core as mx
import numpy as np
import pytest
import torch
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
from peft import LoraConfig, get_peft_model

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import merge_adapters


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
    second = Adapter("b", {P: lora_of(rng, (20, 30), 3, 3.0, mx.float16)}, "base")
    first = Adapter("a", {P: lora_of(rng, (20, 30), 2), Q: lora_of(rng, (20, 30), 5)}, "base")
    merged = merge_adapters([second, first])
    assert (merged.name, merged.sources, merged.base) == ("a+b", ("a", "b"), "base")
    # Q has no more than 5 directions; P could use all 5 of the largest rank, and does.
    assert {path: lora.rank for path, lora in merged.modules.items()} == {P: 5, Q: 5}
    lora = merged.modules[P]
    assert (lora.a.dtype, lora.b.dtype, lora.scale) == (mx.float32, mx.float32, 1.0)
    # Singular values are split evenly: both factors have the same norms, direction by direction.
    a, b = np.array(lora.a), np.array(lora.b)
    assert np.linalg.norm(a, axis=0) == pytest.approx(np.linalg.norm(b, axis=1), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_lego_finds_planted_units(seed):
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


def test_lego_leaves_distinct_units_apart():
    rng = np.random.default_rng(0)
    adapters = [Adapter(f"t{i}", {P: lora_of(rng, (9, 8), 2)}) for i in range(3)]
    merged = merge_adapters(adapters, "lego", rank=10).modules[P]
    assert merged.rank == 6
    assert_close(dense(merged), np.sqrt(2 / 6) * sum(deltas(adapters)), 10.0)
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


def test_regmean_without_data_is_the_mean():
    adapters = mixed_ranks(3, (7, 5), 0)
    for inputs in (np.zeros((4, 7)), np.zeros((0, 7))):
        activations = {P: [inputs] * 3}
        assert_merges(adapters, "regmean", sum(deltas(adapters)) / 3, activations=activations)


def test_regmean_of_modules_with_the_same_inputs_is_that_of_each():
    adapters = adapters_of(np.random.default_rng(0), 4, {P: (9, 7), Q: (9, 5), R: (6, 9)})
    inputs = inputs_of(adapters)
    shared = {**inputs, Q: inputs[P]}
    apart = {**shared, Q: [x.copy() for x in inputs[P]]}
    together, alone, other = (
        merge_adapters(adapters, "regmean", activations=read) for read in (shared, apart, inputs)
    )
    assert together.digest == alone.digest
    assert together.digest != other.digest


# Against PEFT itself: where PEFT is right, and factor by factor.
NAMES, WEIGHTS = ["one", "three", "two"], [0.7, -0.4, 1.3]
SAME, MIXED = ["qv", "qv", "qv"], ["qv", "qk", "vkq"]


@pytest.mark.parametrize(
    "method, ranks, targets, theirs, rank",
    [
        ("concat", (4, 2, 5), MIXED, "cat", None),
        ("linear", (4, 2, 5), MIXED, "cat", 11),
        # PEFT's svd sums dW and truncates it.
        ("linear", (4, 2, 5), MIXED, "svd", 5),
        # It refuses other ranks, which we pad.
        ("factor-linear", (4, 4, 4), SAME, "linear", None),
        ("factor-linear", (4, 4, 4), MIXED, "linear", None),
    ],
)
def test_a_merge_is_pefts(method, ranks, targets, theirs, rank):
    torch.manual_seed(0)
    linears = {name: torch.nn.Linear(24, n, bias=False) for name, n in zip("qkv", (24, 12, 40))}
    model = torch.nn.ModuleDict(linears)
    for name, r, alpha, target in zip(NAMES, ranks, (9, 3, 16), targets):
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=[*target], init_lora_weights=False
        )
        if name == NAMES[0]:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "scaling")}
    adapters = []
    for name in NAMES:
        modules = {}
        for path, layer in layers.items():
            if name in layer.lora_A:
                a, b = (x[name].weight.detach().numpy().T for x in (layer.lora_A, layer.lora_B))
                modules[path] = LoRA(mx.array(a), mx.array(b), layer.scaling[name])
        adapters.append(Adapter(name, modules))
    model.add_weighted_adapter(NAMES, WEIGHTS, "merge", theirs, svd_rank=5)
    merged = merge_adapters(adapters, method, weights=WEIGHTS, rank=rank)
    assert set(merged.modules) == set(layers)
    for path, layer in layers.items():
        delta = layer.get_delta_weight("merge").detach().numpy()
        rtol = 1e-4 if theirs == "svd" else 1e-5  # nearly equal directions
        assert_close(dense(merged.modules[path]), delta, np.linalg.norm(delta), rtol)
