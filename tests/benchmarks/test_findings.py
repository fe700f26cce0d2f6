"""tables/findings.py: sentences on the committed results, beside numbers taken by numpy."""

import re

import numpy as np
import pytest

from benchmarks.tables import findings
from benchmarks.tables.result_files import reader

# Shares of the bytes, which name rows, and the paper's own scores.
TYPED = {"12.5", "6.25", "1.5", "26.0", "22.5"}
PAGES = {"experiment.md.jinja": "experiment", "ablations.md.jinja": "experiment_24"}
RESULTS = {name: reader()(name) for name in ("experiment", "experiment_24", "ablations")}


def said(line, tmp_path, monkeypatch, file="experiment", **results):
    """What becomes of a line of a template."""
    (tmp_path / "one.jinja").write_text(line, encoding="utf-8")
    monkeypatch.setattr(findings, "TEMPLATES", tmp_path)
    (found,) = findings.findings(reader(**RESULTS | results), "one.jinja", file)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_no_number_of_a_result_is_typed(name):
    text = (findings.TEMPLATES / name).read_text(encoding="utf-8")
    outside = re.sub(r"\{\{.*?\}\}", "", text)
    assert set(re.findall(r"(?<!\w)\d+\.\d+", outside)) <= TYPED
    assert len(re.findall(r"\{\{.*?\}\}", text)) > 20


@pytest.mark.parametrize("name", PAGES)
def test_all_that_is_said_was_measured(name):
    lines = findings.findings(reader(), name, PAGES[name])
    assert all(line.startswith("- ") and "Not measured" not in line for line in lines)


def rows_of(result, method, budget):
    """Of all seeds and draws."""
    return [row for row in result["rows"] if (row["method"], row.get("budget")) == (method, budget)]


def scores(result, method, budget, kind=""):
    """`(rows, tasks)`."""
    return np.array([
        [score for task, (_, score) in row["tasks"].items() if task.startswith(kind)]
        for row in rows_of(result, method, budget)
    ])  # fmt: skip


def losses(result, method, budget):
    rows = rows_of(result, method, budget)
    return np.array([[loss for loss, _ in row["tasks"].values()] for row in rows])


def test_numbers_are_those_of_the_results(tmp_path, monkeypatch):
    result = RESULTS["experiment"]
    ceiling = scores(result, "individual", None).mean()
    auto = scores(result, "auto", "6.25%").mean(axis=1)
    line = (
        '{{ it("auto", 6.25).kept_each | map("percent") | join("; ") }}|'
        '{{ it("auto", 6.25).kept | percent }}|{{ it("auto", 6.25, seed=1).score | points }}|'
        '{{ it("auto", 6.25).excess | nats }}|{{ it("K-Means").scores_of("gec") | points }}|'
        '{{ it.ceiling.score | points }}|{{ it("D2C, mean").regret | nats }}|'
        '{{ it.ahead("D2C, moves", "K-Means").difference | points }}'
    )
    each, mean, one, excess, gec, top, regret, ahead = said(line, tmp_path, monkeypatch).split("|")
    assert each.split("; ") == [f"{100 * x / ceiling:.1f} %" for x in auto]
    assert mean == f"{100 * auto.mean() / ceiling:.1f} %"
    (second,) = (row for row in rows_of(result, "auto", "6.25%") if row["seed"] == 1)
    assert one == f"{np.mean([score for _, score in second['tasks'].values()]):.1f}"
    gap = losses(result, "auto", "6.25%").mean() - losses(result, "individual", None).mean()
    assert excess == f"{gap:.3f}"
    assert gec == f"{scores(result, 'K-Means', '12.5%', 'gec-').mean():.1f}"
    assert top == f"{ceiling:.1f}"
    (plain,) = rows_of(result, "D2C, mean", "12.5%")
    assert regret == f"{plain['probe_regret']:.3f}"
    moves, kmeans = (scores(result, name, "12.5%").mean() for name in ("D2C, moves", "K-Means"))
    assert ahead == f"{moves - kmeans:.1f}"


def test_what_was_not_measured_is_said_and_mistakes_are_refused(tmp_path, monkeypatch):
    some = {**RESULTS["experiment"]}
    some["rows"] = [row for row in some["rows"] if row.get("budget") != "3%"]
    line = '- It keeps {{ it("auto", 3).kept | percent }}.'
    assert "Not" not in said(line, tmp_path, monkeypatch)
    expected = "- *Not measured: method auto, budget 3%.*"
    assert said(line, tmp_path, monkeypatch, experiment=some) == expected
    line = '{{ it("auto").scores_of("nope") }}'
    assert said(line, tmp_path, monkeypatch) == "- *Not measured: no task is of kind nope.*"
    line = '{{ case.range_of("nope", case="init") }}'
    assert said(line, tmp_path, monkeypatch) == "- *Not measured: nope.*"
    line = '{{ it("K-Means").regret | nats }}'
    assert said(line, tmp_path, monkeypatch) == "- *Not measured: probe rows that decided.*"
    for line in ("{{ nope | points }}", "{{ it. }}"):
        with pytest.raises(SystemExit, match=r"one\.jinja:1: "):
            said(line, tmp_path, monkeypatch)
