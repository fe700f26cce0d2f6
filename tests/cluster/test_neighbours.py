"""A probe table of the most alike alone: what is measured, and what is expected of the rest."""

import json

import numpy as np
import pytest
from helpers.tiny import library
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.cluster.completion import completed, nearest, others_needed
from d2c_mlx.evaluate.loss_table import LossTable
from d2c_mlx.merge.methods import scaled
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

NAMES = [f"t{i}" for i in range(8)]


@pytest.fixture
def config(tmp_path):
    """Eight adapters, room for four."""
    paths = library(tmp_path, NAMES)
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="4", output=str(tmp_path / "run"), probe_examples=2, test_examples=2,
        baselines=(), merge_method="linear", neighbours=2, search="moves",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "least", "n_clusters", "needed"),
    [(200, 32, 25, 32), (200, 32, 5, 80), (200, 32, None, 32), (24, 32, 3, 23), (24, 8, 5, 10),
     (1, 32, 1, 0)],
)  # fmt: skip
def test_twice_as_many_as_share_a_slot_or_the_least(n, least, n_clusters, needed):
    assert others_needed(n, least, n_clusters) == needed


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 11), st.integers(0, 1000))
def test_a_task_is_measured_under_its_own_adapter_and_the_most_alike(n, n_others, seed):
    assume(n_others < n)
    rows = np.random.default_rng(seed).normal(size=(n, 3))
    cosines = np.corrcoef(rows).reshape(n, n)
    before = cosines.copy()
    measured = nearest(cosines, n_others)
    assert measured.diagonal().all()
    assert (measured.sum(axis=1) == n_others + 1).all()
    for some, alike in zip(measured, cosines):
        assert max(alike[~some], default=-2) <= min(alike[some])
    assert (cosines == before).all()


def random_table(seed, n, additive):
    """Regrets of n tasks; additive: what the task adds and the adapter adds."""
    rng = np.random.default_rng(seed)
    regrets = rng.uniform(0, 0.9, (n, 1)) + rng.uniform(0, 0.9, n)
    regrets = regrets if additive else rng.uniform(-0.5, 1.5, (n, n))
    np.fill_diagonal(regrets, 0)
    return regrets


def hidden(regrets, seed, share):
    """A share of the regrets off the diagonal is not measured."""
    n = len(regrets)
    missing = (np.random.default_rng(seed).random((n, n)) < share) & ~np.eye(n, dtype=bool)
    return np.where(missing, np.nan, regrets), missing


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_expected_losses_are_those_of_ridge_regression(seed):
    """Against least squares with a row for every penalty."""
    n, regrets = 8, random_table(seed, 8, additive=False)
    partial, missing = hidden(regrets, seed, 0.5)
    found = completed(partial)
    assert (found[~missing] == regrets[~missing]).all()

    tasks, adapters = np.nonzero(~missing & ~np.eye(n, dtype=bool))
    assume(len(tasks) > 0)
    rows = np.zeros((len(tasks) + 2 * n, 2 * n + 1))
    each = np.arange(len(tasks))
    rows[each, 0] = rows[each, 1 + tasks] = rows[each, 1 + n + adapters] = 1
    rows[len(tasks) :, 1:] = np.eye(2 * n)
    asked = regrets[tasks, adapters]
    fit = np.linalg.lstsq(rows, np.concatenate([asked, np.zeros(2 * n)]), rcond=None)[0]
    expected = fit[0] + fit[1 : n + 1, None] + fit[n + 1 :]
    assert found[missing] == pytest.approx(expected[missing], abs=1e-6)


def test_what_tasks_and_adapters_add_is_recovered():
    """Of forty, from a third of the table, to a tenth of what regrets vary by."""
    regrets = random_table(0, 40, additive=True)
    partial, missing = hidden(regrets, 0, 0.66)
    error = (completed(partial) - regrets)[missing]
    assert np.sqrt((error**2).mean()) < 0.1 * regrets[missing].std()


def test_a_harmful_adapter_counts_within_bounds():
    """A regret of a million is one of two."""
    regrets = random_table(0, 8, additive=True)
    regrets[1:, 0] = 1e6
    partial, missing = hidden(regrets, 3, 0.3)
    assert completed(partial)[missing].max() < 20


def test_where_no_other_adapter_was_measured_none_serves_a_task():
    found = completed(np.where(np.eye(3), 0.0, np.nan))
    assert (found == 1 - np.eye(3)).all()


def test_estimates_need_task_adapters_alone_at_several_strengths(config):
    session = run(config.replace(search="estimates"), until="probe", quiet=True)
    table = LossTable.from_json(session.read("losses.json"))
    assert np.isnan(table.values).sum() == 8 * 7 and table.weakened.shape == (8, 2)
    evaluator, probes = session.evaluator, session.inputs.probes
    for strength, losses in zip(table.strengths, table.weakened.T):
        for adapter, probe, loss in zip(session.adapters, probes, losses):
            weaker = scaled(adapter, strength).uniform(session.inputs.base.dtype)
            ((found,),) = evaluator.losses([(weaker, [probe])])
            assert loss == pytest.approx(found, rel=1e-6)


def test_a_whole_table_stays_what_it_is():
    regrets = random_table(0, 8, additive=False)
    assert completed(regrets) is regrets


@pytest.mark.slow
def test_a_run_measures_the_most_alike_and_packs(config):
    """Twice two share a slot, so it is four others of seven."""
    session = run(config, until="report", quiet=True)
    measured = nearest(similarity(session.adapters), 4)
    values = np.array(session.read("losses.json")["values"], float)
    assert (np.isnan(values) == ~measured).all()
    record = json.loads((session.output / ".stages" / "probe.json").read_text())
    assert record["evaluations"]["asked"] == 8 + 8 * 5
    assert np.isfinite(session.study.problem.regrets).all()
    assert session.read("bench.json")["methods"]["pack"]["tasks"].keys() == set(NAMES)
    assert "<svg" in (session.output / "report.html").read_text()

    whole = run(config.replace(neighbours=7), until="probe", quiet=True)
    everything = np.array(whole.read("losses.json")["values"], float)
    assert np.isfinite(everything).all()
    assert (everything[measured] == values[measured]).all()


@pytest.mark.parametrize(
    ("changes", "n_others"),
    [({"search": "paper"}, 4), ({"budget": "50%"}, 0), ({"budget": "1"}, 7)],
)
def test_one_slot_asks_for_all_and_a_plan_for_none(config, changes, n_others):
    session = run(config.replace(**changes), until="probe", quiet=True)
    measured = np.isfinite(np.array(session.read("losses.json")["values"], float))
    assert (measured.sum(axis=1) == n_others + 1).all()


@pytest.mark.slow
def test_a_plan_needs_no_more(config):
    session = run(config.replace(budget="50%"), until="bench", quiet=True)
    assert session.read("plan.json")["units"]
