"""Merges of columns and rows against ones in float64: units of LoRA-LEGO, factors apart."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import (
    NUMERIC,
    P,
    Q,
    adapters_of,
    assert_close,
    assert_merges,
    counts,
    deltas,
    dense,
    dims,
    lora_of,
    seeds,
    truncated,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import merge_adapters


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
