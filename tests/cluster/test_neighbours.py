"""A probe table of the most alike alone: what is measured, and what is expected of the rest."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import library
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.cluster.completion import completed, nearest, others_needed
from d2c_mlx.cluster.partition import Problem
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
        baselines=(), merge_method="linear", neighbours=2,
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


def random_problem(seed, n, additive):
    """Losses of n tasks; additive: what the task adds and the adapter adds."""
    rng = np.random.default_rng(seed)
    base, own = rng.uniform(2, 4, n), rng.uniform(0.5, 1.5, n)
    regret = rng.uniform(0, 0.9, (n, 1)) + rng.uniform(0, 0.9, n)
    regret = regret if additive else rng.uniform(-0.5, 1.5, (n, n))
    np.fill_diagonal(regret, 0)
    table = own[:, None] + (base - own)[:, None] * regret
    return Problem(base, table, merge=None, losses=None, features=None)


def hidden(problem, seed, share):
    """A share of the losses off the diagonal is not measured."""
    n = problem.n
    missing = (np.random.default_rng(seed).random((n, n)) < share) & ~np.eye(n, dtype=bool)
    return replace(problem, table=np.where(missing, np.nan, problem.table)), missing


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_expected_losses_are_those_of_ridge_regression(seed):
    """Against least squares with a row for every penalty."""
    n, problem = 8, random_problem(seed, 8, additive=False)
    partial, missing = hidden(problem, seed, 0.5)
    found = completed(partial).table
    assert (found[~missing] == problem.table[~missing]).all()

    own, gain = problem.table.diagonal(), problem.base - problem.table.diagonal()
    tasks, adapters = np.nonzero(~missing & ~np.eye(n, dtype=bool))
    assume(len(tasks) > 0)
    rows = np.zeros((len(tasks) + 2 * n, 2 * n + 1))
    each = np.arange(len(tasks))
    rows[each, 0] = rows[each, 1 + tasks] = rows[each, 1 + n + adapters] = 1
    rows[len(tasks) :, 1:] = np.eye(2 * n)
    asked = (problem.table[tasks, adapters] - own[tasks]) / gain[tasks]
    fit = np.linalg.lstsq(rows, np.concatenate([asked, np.zeros(2 * n)]), rcond=None)[0]
    regret = fit[0] + fit[1 : n + 1, None] + fit[n + 1 :]
    expected = own[:, None] + gain[:, None] * regret
    assert found[missing] == pytest.approx(expected[missing], abs=1e-6)


def test_what_tasks_and_adapters_add_is_recovered():
    """Of forty, from a third of the table, to a tenth of what regrets vary by."""
    problem = random_problem(0, 40, additive=True)
    partial, missing = hidden(problem, 0, 0.66)
    gain = (problem.base - problem.table.diagonal())[:, None]
    error = ((completed(partial).table - problem.table) / gain)[missing]
    spread = ((problem.table - problem.table.diagonal()[:, None]) / gain)[missing].std()
    assert np.sqrt((error**2).mean()) < 0.1 * spread


def test_a_harmful_adapter_counts_within_bounds():
    """A regret of a million is one of two."""
    problem = random_problem(0, 8, additive=True)
    problem.table[1:, 0] = 1e6
    partial, missing = hidden(problem, 3, 0.3)
    assert completed(partial).table[missing].max() < 20


def test_a_whole_table_stays_what_it_is():
    problem = random_problem(0, 8, additive=False)
    assert completed(problem) is problem


def test_a_run_measures_the_most_alike_and_packs(config):
    """Twice two share a slot, so it is four others of seven."""
    ws = run(config, until="report", quiet=True)
    measured = nearest(similarity(ws.adapters), 4)
    values = np.array(ws.read("losses.json")["values"], float)
    assert (np.isnan(values) == ~measured).all()
    record = json.loads((ws.output / ".stages" / "probe.json").read_text())
    assert record["evaluations"]["asked"] == 8 + 8 * 5
    assert np.isfinite(ws.problem.table).all()
    assert ws.read("bench.json")["methods"]["pack"]["tasks"].keys() == set(NAMES)
    assert "<svg" in (ws.output / "report.html").read_text()

    whole = run(config.replace(neighbours=7), until="probe", quiet=True)
    everything = np.array(whole.read("losses.json")["values"], float)
    assert np.isfinite(everything).all()
    assert (everything[measured] == values[measured]).all()


@pytest.mark.parametrize(
    ("changes", "n_others"),
    [({"search": "paper"}, 4), ({"budget": "50%"}, 2), ({"budget": "1"}, 7)],
)
def test_one_slot_asks_for_all_and_a_plan_for_the_least(config, changes, n_others):
    ws = run(config.replace(**changes), until="probe", quiet=True)
    measured = np.isfinite(np.array(ws.read("losses.json")["values"], float))
    assert (measured.sum(axis=1) == n_others + 1).all()


def test_a_plan_needs_no_more(config):
    ws = run(config.replace(budget="50%"), until="bench", quiet=True)
    assert ws.read("plan.json")["units"]
