"""Cases of `quality/slots.py`, at most K adapters, against whole runs and merges by hand."""

import json
import sys

import pytest
from helpers.tiny import end_answers, library

from benchmarks.quality import slots
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def paths(tmp_path):
    return library(tmp_path, NAMES)


@pytest.fixture
def measured(paths, tmp_path, monkeypatch):
    """Call with cases: their rows by case."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    result = tmp_path / "slots.json"
    command = ["slots.py", "--library", tmp_path, "--work", tmp_path / "work", "--output", result,
               "--model", paths.model, "--clusters", 2, "--seeds", 0, "--examples", 2, "--tests",
               2, "--random-seeds", 3]  # fmt: skip

    def call(cases, *more):
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--cases", cases, *more])
        slots.main()
        return {row["case"]: row for row in json.loads(result.read_text())["rows"]}

    return call


def excess(paths, names, adapter):
    """Of every task under an adapter, on two held-out rows."""
    base = Model(str(paths.model))
    tests = [base.encode(n, load_task(paths.tasks / n).test[:2]) for n in names]
    own = [read_adapter(paths.adapters / n, base.module_shapes) for n in names]
    scorer = Scorer(Engine(base))
    (merged,) = scorer.losses([(adapter, tests)])
    return merged - [scorer.losses([(one, [test])])[0][0] for one, test in zip(own, tests)]


def test_runs_are_runs_and_merges_are_of_the_same_clusters(paths, tmp_path, measured):
    rows = measured("individual;estimates;estimates: linear;merge-all: layerwise;random")
    assert rows["individual"]["excess"] == 0 and rows["individual"]["retention"] == 1
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks), budget="2",
        probe_examples=2, test_examples=2, output=str(tmp_path / "run"), baselines=(),
    )  # fmt: skip
    pack = run(config, quiet=True).read("bench.json")["methods"]["pack"]
    assert rows["estimates"]["excess"] == pytest.approx(pack["excess"], abs=1e-6)

    (clusters,) = rows["estimates: linear"]["clusters_of"]
    assert [clusters] == rows["estimates"]["clusters_of"] and len(clusters) == 2
    (merges,) = rows["estimates: linear"]["merges"]
    base = Model(str(paths.model))
    total = 0
    for names, (method, scale) in zip(clusters, merges):
        own = [read_adapter(paths.adapters / name, base.module_shapes) for name in names]
        merge = scaled(merge_adapters(own), scale) if method == "linear" else own[0]
        total += excess(paths, names, merge.uniform(base.dtype)).sum()
    assert rows["estimates: linear"]["excess"] == pytest.approx(total / len(NAMES), abs=1e-4)

    (together,) = rows["merge-all: layerwise"]["clusters_of"]
    assert together == [NAMES]
    assert rows["merge-all: layerwise"]["merges"][0][0][0] in ("regmean", "regmean++", "layerwise")
    draws = rows["random"]
    assert len(draws["each_excess"]) == 3 == len(draws["clusters_of"])
    assert draws["excess"] == pytest.approx(sum(draws["each_excess"]) / 3)


def test_levers_are_runs_on_the_same_clusters(paths, tmp_path, measured):
    end_answers(paths.model)
    rows = measured(
        "estimates;estimates: rank 16;estimates: with prompts;estimates: refined with prompts;"
        "random: rank 16"
    )
    assert len(rows["random: rank 16"]["each_excess"]) == 3
    for how in ("rank 16", "with prompts", "refined with prompts"):
        one = rows[f"estimates: {how}"]
        assert one["clusters_of"] == rows["estimates"]["clusters_of"]
        assert ("refine" in one["stages"]) == how.startswith("refined")
    pack = load_pack(tmp_path / "work" / "2-0-estimates-rank-16" / "pack")
    ranks = {pack.load(name).rank for name in NAMES}
    assert max(ranks) == 16
    assert rows["estimates: rank 16"]["excess"] != rows["estimates"]["excess"]
    for how in ("with-prompts", "refined-with-prompts"):
        place = tmp_path / "work" / f"2-0-estimates-{how}"
        tasks = place.with_name(f"{place.name}.tasks")
        assert f"tasks: {tasks}" in (place / "config.yaml").read_text()
    used = (tmp_path / "work" / "tasks-0" / "a" / "probe.jsonl").read_text()
    rows = map(json.loads, (tasks / "a" / "probe.jsonl").read_text().splitlines())
    assert not any(row["prompt"] in used for row in rows if "completion" not in row)
