"""Every merge method, of the core and of examples/plugin, keeps what it promises."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.loras import (
    P,
    Q,
    adapters_of,
    assert_close,
    dense,
    dense_mean,
    inputs_of,
    lora_of,
    merge_by,
    numeric,
    seeds,
    shapes,
)
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import METHODS, find_method, merge_adapters
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.utils.errors import AdapterError, ConfigError


def flattened(delta, copies, rank):
    """All directions get the mean of the singular values of the sum."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return copies * s[:rank].mean() * u[:, :rank] @ vt[:rank]


def calibrated(delta, copies, rank):
    """A direction with a larger share of the energy is made smaller, at the same norm."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    damped = s / (1 + (copies - 1) * s**2 / (s**2).sum())
    return (u * damped * (np.linalg.norm(s) / np.linalg.norm(damped))) @ vt


def rank_of_update(copies, columns, directions):
    """The rank of the merge: further directions would be noise, made as large as the others."""
    return directions


class Promise(NamedTuple):
    """The promises of one method, beside those that all methods keep.

    All give one adapter back bit for bit, whatever the order and names of several; stay finite,
    zero for zeros, within the rank that was asked for; and follow a common scale.

    Attributes:
        of_equals: dW of n equal adapters, from their dW, n and the rank of the merge; their own.
        rank_of_equals: the rank that needs, from n, the adapters' rank and that of their dW;
            the rank of one adapter.
        draws: another seed gives other bytes; "perhaps" where it only starts a search.
        weights: what `weights` weigh: dW, factors, or nothing if it takes none.
        keeps_all_columns: the rank of the result is the sum of ranks, whatever was asked.
        exact: the mean of dW if there is room for it.
    """

    of_equals: Callable = lambda delta, copies, rank: delta
    rank_of_equals: Callable = lambda copies, columns, directions: columns
    draws: str | None = None
    weights: str | None = None
    keeps_all_columns: bool = False
    exact: bool = False


# At density 1, where nothing is trimmed or dropped.
PROMISES = {
    "linear": Promise(weights="dW", exact=True),
    "ties": Promise(),
    "tsv": Promise(rank_of_equals=lambda n, rank, _: n * rank),  # r / n of r directions of each
    "regmean": Promise(),
    "dare-linear": Promise(draws="yes"),
    "dare-ties": Promise(draws="yes"),
    "emr": Promise(),
    "knots": Promise(),
    "iso-c": Promise(flattened, rank_of_update),
    "iso-cts": Promise(flattened, rank_of_update),
    "pico": Promise(calibrated),
    "ctm": Promise(),
    "wudi": Promise(),
    "lego": Promise(draws="perhaps"),
    "concat": Promise(weights="dW", keeps_all_columns=True, exact=True),
    # Sums of n factors: (n A / sqrt n)(n B / sqrt n).
    "factor-linear": Promise(lambda delta, n, rank: n * delta, weights="factors"),
}


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
    modules = {P: lora_of(rng, (6, 5), 2, 3.0, dtype), Q: lora_of(rng, (3, 3), 1)}
    merged = merge_by([Adapter("a", modules, "base")], method, density=0.1)
    for path, lora in modules.items():
        same = merged.modules[path]
        assert (same.a.dtype, same.b.dtype, same.scale) == (lora.a.dtype, lora.b.dtype, lora.scale)
        assert mx.array_equal(same.a, lora.a) and mx.array_equal(same.b, lora.b)
    assert (merged.name, merged.base, merged.sources) == ("a", "base", ("a",))
    both = [Adapter("ab", modules, None, ("a", "b"))]
    assert merge_adapters(both).sources == ("a", "b")
    if PROMISES[method].weights:
        twice = merge_adapters(both, method, weights=[2.0]).modules
        assert_close(dense(twice[P]), 2 * dense(modules[P]), 100.0, 1e-5)


METHOD = st.sampled_from(sorted(PROMISES))
ORDER = st.permutations(range(4))


@pytest.mark.slow
@numeric(METHOD, shapes, st.integers(1, 5), ORDER, st.sampled_from([0.1, 0.5, 1.0]), seeds, n=80)
def test_order_and_repetition_change_no_bit(method, shape, rank, order, density, seed):
    """Adapters with different names, and with one for all."""
    own = adapters_of(np.random.default_rng(seed), 4, {P: shape, Q: (5, 11)})
    options = {"density": density, "rank": rank, "seed": seed}
    for adapters in (own, [replace(adapter, name="same") for adapter in own]):
        merged = merge_by(adapters, method, **options)
        for again in (adapters, [adapters[i] for i in order]):
            other = merge_by(again, method, **options)
            assert (other.digest, other.name) == (merged.digest, merged.name)
            assert other.sources == merged.sources


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_adapters_where_a_method_defines_something_else(copies):
    rng = np.random.default_rng(0)
    loras = [lora_of(rng, (9, 7), 3, 4.0), lora_of(rng, (1, 1), 2), lora_of(rng, (2, 8), 4)]
    for (method, promise), lora in product(PROMISES.items(), loras):
        adapters, delta = [Adapter(f"t{i}", {P: lora}) for i in range(copies)], dense(lora)
        rank = promise.rank_of_equals(copies, lora.rank, np.linalg.matrix_rank(delta))
        expected = promise.of_equals(delta, copies, rank)
        merged = merge_by(adapters, method, density=1.0, rank=rank)
        assert_close(dense(merged.modules[P]), expected, np.linalg.norm(expected), 1e-5)


@numeric(shapes, st.integers(2, 4), st.integers(1, 6), METHOD, n=30)
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
    merged = dense(merge_by(adapters, method, density=1.0, rank=8).modules[P])
    assert np.isfinite(merged).all() and np.abs(merged).max() > 1e9
    if PROMISES[method].exact:
        mean = dense_mean(adapters, P, (12, 10))
        assert_close(merged, mean, np.linalg.norm(mean))


@pytest.mark.parametrize("method", PROMISES)
def test_updates_of_zero_and_of_too_few_directions(method):
    """Zeros; parallel columns, a column of zeros, and a task that is a multiple of another."""
    rng = np.random.default_rng(0)
    zero = LoRA(mx.ones((8, 2)), mx.zeros((2, 6)))
    a, b = rng.normal(size=(8, 1)), rng.normal(size=(3, 6))
    a = np.concatenate([a, 2 * a, 0 * a], axis=1)
    deficient = [LoRA(mx.array(a), mx.array(b), scale) for scale in (1.0, -0.5)]
    whole = lora_of(rng, (8, 6), 2, 3.0)
    for loras, rank in product(([zero, zero], [zero, whole], [*deficient, whole]), (1, 3, 20)):
        adapters = [Adapter(f"t{i}", {P: lora}) for i, lora in enumerate(loras)]
        merged = dense(merge_by(adapters, method, rank=rank).modules[P])
        assert np.isfinite(merged).all()
        size = sum(np.linalg.norm(dense(lora)) for lora in loras)
        assert np.linalg.norm(merged) <= 10 * size


@pytest.mark.parametrize("method", PROMISES)
def test_only_methods_that_draw_ask_for_the_seed(method):
    adapters = adapters_of(np.random.default_rng(3), 4, {P: (12, 10), Q: (9, 9)})
    digests = [merge_by(adapters, method, rank=2, seed=seed).digest for seed in (0, 1, 0)]
    assert digests[0] == digests[2]
    if PROMISES[method].draws != "perhaps":
        assert (digests[0] != digests[1]) == (PROMISES[method].draws == "yes")
    if PROMISES[method].draws == "yes":
        lora = lora_of(np.random.default_rng(0), (9, 7), 4)
        merged = merge_adapters([Adapter(name, {P: lora, Q: lora}) for name in "ab"], method)
        assert not mx.array_equal(merged.modules[P].a, merged.modules[Q].a)


@pytest.mark.parametrize("method", PROMISES)
@pytest.mark.parametrize("size", [4.0, 0.25, 1e-36])
def test_a_common_scale_goes_through(method, size):
    adapters = adapters_of(np.random.default_rng(4), 3, {P: (9, 7), Q: (5, 6)})
    modules = [{p: LoRA(x.a, x.b, size * x.scale) for p, x in a.modules.items()} for a in adapters]
    sized = [replace(adapter, modules=own) for adapter, own in zip(adapters, modules)]
    activations = inputs_of(adapters) if method == "regmean" else None
    merged, other = (
        merge_adapters(each, method, rank=3, activations=activations) for each in (adapters, sized)
    )
    for path, lora in merged.modules.items():
        expected = size * dense(lora)
        assert_close(dense(other.modules[path]), expected, np.linalg.norm(expected), 1e-4)


def test_options_that_are_wrong_are_named():
    adapters = adapters_of(np.random.default_rng(0), 3, {P: (9, 7), Q: (5, 6)})
    inputs = inputs_of(adapters)
    inputs[P][1] = np.zeros((4, 8))
    wrong = [
        ("density: found 0.0", {"density": 0.0}),
        ("rank: found 0", {"rank": 0}),
        ("weights: 'ties' takes none", {"method": "ties", "weights": [1, 1, 1]}),
        ("weights: found", {"weights": [1.0, float("nan"), 1.0]}),
        ("activations: 'linear' takes none", {"activations": {}}),
        ("activations: 'regmean' needs 3 arrays.*2 lack them", {"method": "regmean"}),
        ("activations: .*expected .n_tokens, 9", {"method": "regmean", "activations": inputs}),
        ("merge_method: found 'dare', .* of linear, ties", {"method": "dare"}),
    ]
    for message, options in wrong:
        pytest.raises(ConfigError, merge_adapters, adapters, **options).match(message)
    error = pytest.raises(ConfigError, merge_adapters, [], density=2.0, rank=-1)
    assert len(error.value.problems) == 3
    other = Adapter("other", {P: lora_of(np.random.default_rng(0), (5, 5), 1)})
    with pytest.raises(AdapterError, match="model.layers.0.q: .*different base models.*5, 5.*9, 7"):
        merge_adapters([*adapters, other])


def test_the_table_of_the_documents_is_true():
    """merge-methods.md: one row per method, and no option that merge_adapters lacks."""
    text = (ROOT / "docs" / "reference" / "merge-methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w+-]+)` \|(.+)\|$", text, re.M)
    assert [name for name, _ in rows] == ["layerwise", "regmean++", *PROMISES]
    assert all("of a run only" in about for _, about in rows[:2])
    options = set(re.findall(r"`([a-z_-]+)=", text))
    assert options <= {"seed", "weights", "density", "rank", "activations"}
