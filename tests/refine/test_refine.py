"""Refining: gradients and divergence against references, what may be touched, what is kept."""

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import divergence, log_probabilities, refinable
from mlx.utils import tree_flatten, tree_map

from d2c_mlx import merge_adapters, read_adapter
from d2c_mlx.compress.compact_file import index_of, read_compact, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.refine.refine import Member, TrainOptions, plain, pull_back, refine, student_of

NAMES = ["a", "b"]


@pytest.fixture
def paths(tmp_path):
    return refinable(tmp_path, NAMES)


@pytest.fixture
def base(paths):
    return Model(str(paths.model))


@pytest.fixture
def members(paths, base):
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in NAMES]
    probes = [base.encode(name, load_task(paths.tasks / name).probe) for name in NAMES]
    return [Member(adapter, probe, gain=1.0) for adapter, probe in zip(adapters, probes)]


@pytest.fixture
def merged(base, members):
    return merge_adapters([member.adapter for member in members]).uniform(base.dtype)


FAST, STORED = TrainOptions(steps=20, rate=5e-3), TrainOptions(steps=40, rate=2e-2)
# Several levels in one module, and numbers in 16 bit.
LEVELS = {"low": ((2, 2),), "mixed": ((1, 4), (2, 2)), "sixteen": ((1, 16), (1, 3))}


@pytest.fixture(params=["merge", *LEVELS])
def start(request, members, merged):
    """A merge, or a stored form."""
    if request.param == "merge":
        return merged
    adapter = members[0].adapter
    return compress(adapter, dict.fromkeys(adapter.modules, LEVELS[request.param]))


def _student(base, merged, member):
    model = Distiller(base)
    rows = model.teacher_rows(member.adapter, member.probe)
    base.attach(merged)
    return model, rows, student_of(merged, base.dtype).start


def test_loss_is_nll_and_divergence_over_the_whole_vocabulary(base, members, merged):
    """Against log-softmax in float64 numpy of the whole model's logits, row by row."""
    model, rows, factors = _student(base, merged, members[0])
    for row in rows:
        example, n = row.example, row.example.n_targets
        p, q = (log_probabilities(base, x, example) for x in (members[0].adapter, merged))
        targets = np.arange(n), list(example.tokens[example.first_target :])
        divergences = (np.exp(p) * (p - q)).sum(axis=-1)
        assert divergences.max() > 0.01
        assert row.nll == pytest.approx(-p[targets].sum(), abs=1e-4)
        for i in range(n):
            weights = np.zeros((n, 2), np.float32)
            weights[i] = 2.0, 3.0
            loss = float(model.loss(factors, [row], mx.array(weights)))
            assert loss == pytest.approx(-2 * q[targets][i] + 3 * divergences[i], abs=2e-4)


def along(t, x, step):
    return x + t * step


def test_gradients_against_finite_differences(base, members, start):
    """In a random direction of every module."""
    student, model = student_of(start, base.dtype), Distiller(base)
    rows = model.teacher_rows(members[1].adapter, members[1].probe)
    base.attach(plain(start, base.dtype) if isinstance(start, Compressed) else start)
    weights = [(0.7, 1.3)] * len(rows)
    each = mx.array(np.repeat(weights, [r.example.n_targets for r in rows], axis=0), mx.float32)
    by_factor = model.gradient(student.factors(student.start), rows, weights)
    gradient = pull_back(student.factors, student.start, by_factor)
    rng = np.random.default_rng(0)
    for path, part in student.start.items():
        step = tree_map(lambda x: mx.array(rng.normal(size=x.shape).astype(np.float32)), part)
        size = sum(float((x * x).sum()) for _, x in tree_flatten(step)) ** 0.5
        pairs = zip(tree_flatten(gradient[path]), tree_flatten(step))
        expected = sum(float((g * d).sum()) for (_, g), (_, d) in pairs) / size

        def at(t, path=path, part=part, step=step, size=size):
            moved = {**student.start, path: tree_map(partial(along, t / size), part, step)}
            return float(model.loss(student.factors(moved), rows, each))

        slope = (at(2e-3) - at(-2e-3)) / 4e-3
        assert slope == pytest.approx(expected, rel=3e-2, abs=3e-2)


def test_gradient_through_our_exponentials_is_that_of_stock_mlx_lm(base, members, merged):
    gradients = []
    for fast in (True, False):
        use_fast_exponentials(base.model, fast)
        model, rows, factors = _student(base, merged, members[0])
        model._fast = fast
        gradients.append(model.gradient(factors, rows, [(1.0, 1.0)] * len(rows)))
    for ours, stock in zip(*map(tree_flatten, gradients)):
        assert float(mx.abs(stock[1]).max()) > 0
        np.testing.assert_allclose(ours[1], stock[1], rtol=1e-3, atol=1e-3)


def test_a_gradient_of_small_weights_is_none_of_zeros_in_float16(base, members, merged):
    """As on Metal, and as with many tasks or long answers: against the same in float32."""
    small, gradients = 2.0**-20, []
    for dtype, weight in ((mx.float32, 1.0), (mx.float16, small)):
        base.compute_dtype = dtype
        base.model.set_dtype(dtype)
        model, rows, factors = _student(base, merged, members[0])
        gradient = model.gradient(factors, rows, [(weight, weight)] * len(rows))
        gradients.append(np.concatenate([np.ravel(x) for _, x in tree_flatten(gradient)]))
    exact, rounded = gradients
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert cosine > 0.999
    assert np.linalg.norm(rounded) == pytest.approx(small * np.linalg.norm(exact), rel=0.02)


def mean_divergence(base, adapter, members):
    """In units of the gains, by float64 numpy over the whole model's logits."""
    each = []
    for member in members:
        nats = divergence(base, member.adapter, adapter, member.probe)
        each.append(nats / member.probe.n_targets / member.gain)
    return np.mean(each)


# A merge of one is not trained.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "n"), [("merge", 2), *itertools.product(LEVELS, (1, 2))], indirect=["start"]
)
def test_it_comes_closer_in_the_same_rank_codes_and_bytes(base, members, start, n, tmp_path):
    """By an independent evaluation; one task, as most of a plan's adapters have, or two."""
    stored = isinstance(start, Compressed)
    refined = refine(base, start, members[:n], STORED if stored else FAST)
    adapters = [start, refined.adapter]
    if stored:
        numbers = map(numbers_of, adapters)
        codes = [
            {k: x for k, x in each.items() if "weight" in k and 16 not in k} for each in numbers
        ]
        assert codes[0] == codes[1] and refined.adapter.nbytes == start.nbytes
        assert index_of([refined.adapter]).tensors() == index_of([start]).tensors()
        # As read from the file.
        write_compact(tmp_path / "pack", [refined.adapter])
        adapters = [x.adapter(base.dtype) for x in (start, read_compact(tmp_path / "pack", 0))]
    assert refined.after < 0.8 * refined.before
    for value, adapter in zip((refined.before, refined.after), adapters):
        assert mean_divergence(base, adapter, members[:n]) == pytest.approx(value, abs=1e-4)
    assert adapters[1].rank == adapters[0].rank
    assert {x.dtype for m in adapters[1].modules.values() for x in (m.a, m.b)} == {base.dtype}


@pytest.mark.parametrize("rate", [1e-12, 1e30])
def test_the_merge_itself_is_kept_when_nothing_helps(base, members, merged, rate):
    refined = refine(base, merged, members, replace(FAST, rate=rate, steps=8))
    assert refined.adapter is merged


@pytest.fixture
def steps(monkeypatch):
    """The rows of each step with their weights, as they are trained on."""
    seen, gradient = [], Distiller.gradient

    def spy(self, factors, rows, weights):
        seen.append([(row.example, w) for row, w in zip(rows, weights)])
        return gradient(self, factors, rows, weights)

    monkeypatch.setattr(Distiller, "gradient", spy)
    return seen


def test_tasks_weigh_alike_and_every_row_is_trained_on_as_often(base, members, merged, steps):
    """Weights times targets sum to one over the gain, for every task."""
    members[1] = replace(members[1], gain=0.25)
    refine(base, merged, members, FAST)
    for member in members:
        for step in steps:
            mine = [(e.n_targets, w) for e, w in step if e in member.probe.examples]
            assert sum(n * w[1] for n, w in mine) == pytest.approx(0.5 / member.gain)
            assert all(w[0] == 0 for _, w in mine)
        trained = Counter(example for step in steps for example, _ in step)
        times = [trained[row] for row in member.probe.examples]
        assert sum(times) == FAST.steps * FAST.rows and max(times) - min(times) <= 1


def test_one_row_of_a_task_is_trained_on_and_one_member_is_not(base, members, merged):
    probes = [replace(member.probe, examples=member.probe.examples[:1]) for member in members]
    few = [replace(member, probe=probe) for member, probe in zip(members, probes)]
    refined = refine(base, merged, few, FAST)
    assert refined.adapter is not merged and refined.after < refined.before
    alone = refine(base, members[0].adapter, members[:1], FAST)
    assert alone.adapter is members[0].adapter and alone.before == alone.after == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_any_order(base, members, start):
    def numbers(adapter, seed=0):
        refined = refine(base, adapter, members, replace(FAST, seed=seed)).adapter
        return numbers_of(refined) if isinstance(refined, Compressed) else refined.digest

    other_order = replace(start, modules=dict(reversed(start.modules.items())))
    assert numbers(start) == numbers(other_order) != numbers(start, seed=1)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_base_in_16_or_4_bit_is_refined_in_float32(base, members, merged, bits):
    """As on Metal, where the base keeps its own dtype."""
    base.model.set_dtype(mx.bfloat16)
    base.compute_dtype = mx.bfloat16
    if bits == 4:
        nn.quantize(base.model, group_size=32, bits=4)
    model, rows, factors = _student(base, merged, members[0])
    gradient = model.gradient(factors, rows, [(1.0, 1.0)] * len(rows))
    assert {x.dtype for _, x in tree_flatten(gradient)} == {mx.float32}
    refined = refine(base, merged, members, FAST)
    assert refined.after < refined.before


def test_a_step_has_rows_of_both_kinds_given_answers_and_own_ones(base, members, merged, steps):
    own = base.encode("a", [{"prompt": "What is a question?", "completion": "An answer."}])
    member = members[0]
    refined = refine(base, merged, [replace(member, own=own), members[1]], FAST)
    for step in steps:
        rows = {example for example, _ in step}
        assert own.examples[0] in rows and rows & {*member.probe.examples}
    assert refined.adapter.digest != refine(base, merged, members, FAST).adapter.digest


def test_what_the_rows_answer_does_not_count_but_their_tokens_do(base, members, merged):
    """A merge whose members agree with the merge is kept, whatever the rows' answers are."""
    refined = refine(base, merged, [replace(each, adapter=merged) for each in members], FAST)
    assert refined.adapter is merged and refined.before == pytest.approx(0, abs=1e-6)


def numbers_of(form):
    """Every stored array, by name."""
    return {
        (path, level.bits, side, name): getattr(getattr(level, side), name).tolist()
        for path, levels in form.modules.items()
        for level, side, name in itertools.product(levels, "ab", ("weight", "scales", "biases"))
    }


def dequantized(part):
    """The rows of a stored factor in float64, by MLX's own `dequantize`."""
    if part.bits == 16:
        return part.weight.astype(np.float64)
    scales, biases = (mx.array(x.astype(np.float32)) for x in (part.scales, part.biases))
    rows = mx.dequantize(mx.array(part.weight), scales, biases, part.group_size, part.bits)
    return np.array(rows, np.float64)[:, : part.width]


@pytest.mark.parametrize("start", LEVELS, indirect=True)
def test_the_start_is_what_is_stored_and_makes_the_same_form(base, start):
    student = student_of(start, base.dtype)
    factors = student.factors(student.start)
    assert factors.keys() == start.modules.keys()
    for path, levels in start.modules.items():
        a, b = (np.array(x[0], np.float64) for x in factors[path])
        assert a.shape[1] == sum(level.rank for level in levels)
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-3)
        expected = sum(dequantized(level.a).T @ dequantized(level.b) for level in levels)
        np.testing.assert_allclose(a @ b, expected, atol=1e-6)
    again = student.form(student.start)
    assert numbers_of(again) == numbers_of(start)
    assert (again.name, again.nbytes) == (start.name, start.nbytes)
