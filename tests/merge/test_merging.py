"""Merges as a pack holds them: every method, rank and scale; how far rows are believed."""

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.runs import config_of
from helpers.tiny import divergence, library, peft_adapter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_1samp

from d2c_mlx.compress.plan import plan
from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.evaluate.distill import Distiller, output_sketch
from d2c_mlx.merge.layerwise import merge_layerwise
from d2c_mlx.merge.library import shrinkage
from d2c_mlx.merge.merging import merge, problem_of, quick_merge
from d2c_mlx.merge.methods import RUN_METHODS, MergeOptions, merge_adapters, scaled
from d2c_mlx.models.examples import Example
from d2c_mlx.pipeline import run
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

OPTIONS = MergeOptions()


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A measured library of three adapters, the last of another rank and other modules."""
    root = tmp_path_factory.mktemp("merging")
    paths = library(root, ["a", "b", "c"])
    peft_adapter(paths.adapters, "c", rank=3, seed=5, targets=("mlp.down_proj",))
    config = config_of(paths, root / "run", budget="60%", probe_examples=4)
    return run(config, until="probe", quiet=True)


@pytest.fixture(scope="module")
def measured(session):
    return session.library


@pytest.mark.slow
@pytest.mark.parametrize("method", [*RUN_METHODS, *names(MERGE_METHODS)])
def test_every_method_merges_what_a_run_has(measured, method):
    merged = merge(measured, (0, 1, 2), MergeOptions(method))
    assert merged.method in ("regmean", method) and merged.adapter.sources == ("a", "b", "c")
    losses = measured.scorer.losses([(merged.adapter, measured.calibration)])
    assert np.isfinite(losses).all()
    quick = quick_merge(measured, (0, 1, 2), MergeOptions(method))
    assert quick.adapter.base == merged.adapter.base
    # Few are judged by what ships, which has no scale to search.
    assert quick is merged if method == "layerwise" else math.isfinite(quick.regret)


@pytest.mark.parametrize(
    ("members", "better"), [((0, 1, 2), "regmean++"), ((0, 1), "regmean"), ((1, 2), "regmean++")]
)
def test_regmean_again_is_regmean_on_what_reaches_the_merge(measured, members, better):
    """By hand: the inputs under the plain merge, RegMean on them, the better of the two."""
    options = MergeOptions("regmean++")
    plain, again = quick_merge(measured, members, options), merge(measured, members, options)
    adapters = [measured.adapters[i] for i in members]
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    rows = [measured.calibration[i] for i in members]
    inputs = input_activations(measured.base, plain.adapter, rows, paths)
    activations = {path: [each[path] for each in inputs] for path in paths}
    by_hand = merge_adapters(adapters, "regmean", activations=activations)

    def regret(scale):
        adapter = scaled(by_hand, scale).uniform(measured.base.dtype)
        losses = measured.scorer.losses([(adapter, rows)])[0]
        return float(measured.losses.regret(losses, np.array(members)).mean())

    lowest = line_search(regret, COARSE_SCALES)[1]
    assert again.method == better == ("regmean++" if lowest < plain.regret - 1e-3 else "regmean")
    if better == "regmean":
        assert again.adapter.digest == plain.adapter.digest
    else:
        assert again.regret <= lowest + 1e-6


@pytest.mark.parametrize(
    ("members", "cosine", "scale"),
    [((0, 1), -0.9, 1.0), ((1, 2), 0.0, 1.0), ((0, 1, 2), 0.0, 1.4), ((0, 1, 2), 0.9, 1.0)],
)
def test_layerwise_is_the_default_at_a_scale_that_is_not_searched(measured, members, cosine, scale):
    """Two members are few, however unlike."""
    adapters = [measured.adapters[i] for i in members]
    rows = [measured.calibration[i] for i in members]
    library = replace(measured)
    vars(library)["similarity"] = np.full((3, 3), cosine) + (1 - cosine) * np.eye(3)
    merged = merge(library, members, OPTIONS)
    sketches = [measured.sketch(i) for i in members]
    expected = merge_layerwise(measured.base, adapters, rows, scale=scale, sketches=sketches)
    assert (merged.method, merged.scale, merged.regret) == ("layerwise", scale, math.inf)
    assert merged.adapter.digest == expected.uniform(measured.base.dtype).digest


def test_a_sketch_is_of_four_rows_half_way_to_the_base_model(measured):
    rows, half = measured.calibration[0].first(4, ()), scaled(measured.adapters[0], 0.5)
    expected, sketch = output_sketch(measured.base, half, rows, 32), measured.sketch(0)
    assert all((sketch[path] == x).all() for path, x in expected.items())
    assert measured.sketch(0) is sketch and sketch.keys() == expected.keys()


def test_a_merge_is_at_the_best_scale_or_at_that_of_another(measured):
    problem, like = problem_of(measured, OPTIONS), quick_merge(measured, (0, 1), OPTIONS)
    assert like.scale in COARSE_SCALES
    assert next(iter(like.adapter.modules.values())).a.dtype == mx.float16
    for members in ((0, 1), (0, 2)):
        fixed = quick_merge(measured, members, OPTIONS, like.scale)
        taken = problem.merge(members, like=(0, 1))
        assert fixed.scale == like.scale and taken.digest == fixed.adapter.digest
    assert problem.merge((0, 1)).digest == like.adapter.digest
    assert problem.merge((2,), like=(0, 1)).digest == problem.merge((2,)).digest
    # A larger rank is for merges alone.
    ranks = [quick_merge(measured, x, MergeOptions(rank=8)).adapter.rank for x in ((0, 1), (0,))]
    assert ranks == [8, 4]


def test_nats_decide_where_the_merges_that_ship_are_measured(measured, monkeypatch):
    gain = measured.losses.gain
    assert problem_of(measured, OPTIONS).weights == pytest.approx(gain / gain.mean())
    monkeypatch.setattr("d2c_mlx.merge.merging._JUDGED_AS_SHIPPED", 2)
    assert (problem_of(measured, OPTIONS).weights == 1).all()


# How far a task's own rows are believed against what its adapter expects


@given(arrays(np.float64, st.integers(2, 12), elements=st.floats(-2, 2, width=16)))
def test_shrinkage_is_what_the_confidence_interval_leaves(shifts):
    share = shrinkage(shifts, [1] * len(shifts))
    if np.ptp(shifts) == 0:
        assert share == (shifts[0] != 0)
        return
    low, high = ttest_1samp(shifts, 0).confidence_interval(0.95)
    mean, half = (low + high) / 2, (high - low) / 2
    expected = max(0.0, 1 - (half / mean) ** 2) if abs(mean) > 1e-12 else 0.0
    assert share == pytest.approx(expected, abs=1e-9)
    # Nothing but the ratio of mean and spread counts.
    assert shrinkage(-3 * shifts, [5] * len(shifts)) == pytest.approx(share, abs=1e-9)


def test_long_rows_weigh_more_and_a_single_one_nothing():
    assert shrinkage(np.array([2.0, 4.0, 6.0]), [1, 2, 3]) == 1
    assert shrinkage(np.array([3.0]), [1]) == 0


@pytest.fixture(scope="module")
def rows_of(measured):
    """`rows_of(seed)`: ten rows per adapter, their answers drawn from what it says."""
    base = measured.base

    def answered(adapter, probe, rng):
        base.attach(adapter)
        rows = []
        for example in itertools.islice(itertools.cycle(probe.examples), 10):
            tokens = list(example.tokens[: example.offset])
            tokens[-1] = int(rng.integers(3, 300))
            for _ in range(12):
                logits = np.array(base.model(mx.array([tokens]))[0, -1], np.float64)
                tokens.append(int(np.argmax(logits + rng.gumbel(size=logits.size))))
            rows.append(Example(tuple(tokens), example.offset))
        return replace(probe, examples=tuple(rows), cuts=())

    def rows(seed):
        pairs = zip(measured.adapters[:2], measured.calibration)
        return [answered(*pair, np.random.default_rng(seed)) for pair in pairs]

    return rows


def library_of(measured, adapters, sets):
    """The first two tasks with other adapters and rows."""
    tasks = [replace(task, calibration=rows) for task, rows in zip(measured.tasks[:2], sets)]
    return replace(measured, adapters=adapters, tasks=tasks)


def test_rows_that_say_weaker_are_believed_and_those_of_the_adapter_have_no_say(measured, rows_of):
    adapters = measured.adapters[:2]
    taught = library_of(measured, adapters, rows_of(1)).by_teacher
    assert taught.trust == [0, 0]
    assert [rows.teacher for rows in taught.calibration] == [each.digest for each in adapters]
    # Twice as strong as what answered their rows.
    strong = [scaled(adapter, 2.0) for adapter in adapters]
    taught = library_of(measured, strong, rows_of(0)).by_teacher
    for i, trust in enumerate(taught.trust):
        own, weaker = (float(taught.regrets(x[i], [i])[0]) for x in (strong, adapters))
        assert 0.3 < trust < 1 and own == pytest.approx(0, abs=1e-4) and weaker < -0.01


@pytest.mark.slow
def test_forms_are_stored_weaker_where_rows_say_so(session, measured, rows_of, tmp_path):
    """Scales below 1 are tried for such adapters, and for no others."""

    def forms(adapters, sets):
        library = library_of(measured, adapters, sets)
        planned = plan(library, session.capacity, tmp_path, session.config.merging)
        trust = dict(zip(library.names, library.by_teacher.trust))
        assert planned.content["trust"] == {name: x for name, x in trust.items() if x}
        return zip(*((x.scale, x.regret) for x in planned.chosen if x.family == "own"))

    scales, _ = forms(measured.adapters[:2], rows_of(1))
    assert min(scales) >= 1
    scales, regrets = forms([scaled(x, 2.0) for x in measured.adapters[:2]], rows_of(0))
    assert min(scales) < 1 and min(regrets) < 0


@pytest.mark.parametrize("trust", [0.0, 0.4, 1.0])
def test_a_trusted_row_enters_by_its_weight(measured, trust):
    """Against rows of logits in float64; another weight is another set."""
    base, (own, other, _), probe = measured.base, measured.adapters, measured.calibration[0]
    model, n = Distiller(base), probe.n_targets
    taught = model.with_teacher(own, probe, trust)
    (losses,) = measured.scorer.losses([(other, [taught])])
    rows = model.compare(other, model.teacher_rows(own, probe))
    nll = [sum(measured.scorer.losses([(adapter, [probe])])[0]) for adapter in (own, other)]
    assert rows[:, 0].sum() / n == pytest.approx(nll[1] - nll[0], abs=1e-4)
    kl = divergence(base, own, other, probe) / n
    assert rows[:, 1].sum() / n == pytest.approx(kl, abs=1e-4)
    assert losses[0] == pytest.approx((1 - trust) * kl + trust * (nll[1] - nll[0]), abs=1e-4)
    divergences = model.divergence(other, model.teacher_rows(own, probe))
    assert divergences == pytest.approx(kl, abs=1e-4)
    again = model.with_teacher(own, probe, trust + 0.1)
    assert len({taught.digest, again.digest, probe.digest}) == 3
