"""What a run says of itself: what it found, what came out."""

import json
import os
from pathlib import Path

import pytest
from helpers.runs import config_of, stages_started
from helpers.tiny import library

from d2c_mlx.pipeline import run
from d2c_mlx.report.report import answered, next_commands, verdict
from d2c_mlx.run.config import load_config
from d2c_mlx.run.run import Run
from d2c_mlx.utils.errors import InputError

TASK = {"excess": 0.02, "retention": 0.98, "loss": 1.0}
BENCH = {
    "methods": {
        "base": {"excess": 2.0},
        "individual": {"nbytes": 9_000_000},
        "pack": {"nbytes": 1_500_000, "loss": 1.0, "excess": 0.0123, "retention": 0.991,
                 "tasks": {"a": TASK, "b": {**TASK, "excess": 0.05, "retention": None}}},
    },
    "rows": {"a": [[1.0, 2]] * 2, "b": [[1.0, 2]] * 2},
    "n_held_out": 10,
    "interval": {"low": -0.01, "high": 0.035},
    "unpacked_nbytes": 7_500_000,
    "provenance": {"config": {"model": "org/base", "test_examples": 8, "tasks": "tasks"}},
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    paths = library(tmp_path, ["a", "b", "c"])
    return config_of(paths, tmp_path / "run", probe_examples=2)


def test_the_result_in_words(monkeypatch, tmp_path):
    assert verdict(BENCH) == (
        "2 adapters, 9 MB in all, take 1.5 MB (16.7%), unpacked for other programs 7.5 MB. On 4"
        " of 10 held-out rows that costs 0.0123 nats per target token (95% interval -0.0100 to"
        " 0.0350: too few rows to tell more); 99.1% of what the adapters gain is kept. The worst"
        " task is b: 0.0500 nats."
    )
    pairs = {
        "random": {"difference": -0.02, "low": -0.03, "high": -0.01},
        "kmeans": {"difference": 0.0031, "low": -0.001, "high": 0.005},
    }
    plan = {"budget": "6.25%", "retention": 0.998}
    assert verdict({**BENCH, "rivals": pairs, "plan": plan}).endswith(
        " The pack is behind kmeans, its best rival, by 0.0031 nats, which these rows are too few"
        " to tell. --budget 6.25% would be smaller, and keep 99.8% by an estimate."
    )
    ask, *_ = next_commands("my runs/1", "a", "org/base", compact=True)
    assert ask == "d2c-mlx generate 'my runs/1' --task a --model org/base \"...\""
    # Where no environment is active.
    monkeypatch.setattr("sys.argv", [str(tmp_path / "env/bin/d2c-mlx")])
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert next_commands("runs/1", "a", None, True)[2] == "env/bin/d2c-mlx serve runs/1"


def test_a_new_pack_does_not_stand_beside_an_old_report(config, capsys):
    session = run(config.replace(test_examples=1))
    head = capsys.readouterr().err
    assert head.startswith("found 3 adapters of model (")
    assert "2 calibration and 1 held-out rows each; budget: 2; device: cpu\n" in head
    assert session.read("bench.json")["interval"] == {"low": None, "high": None}
    assert "(no interval: a task has one held-out row" in session.path("report.md").read_text()
    run(config.replace(test_examples=1, budget="1"), "pack", quiet=True)
    assert not [path for path in session.output.iterdir() if path.stem in ("report", "bench")]


def test_a_run_goes_on_from_another_directory(config, tmp_path, monkeypatch):
    """`d2c-mlx run --output .` in the directory of the report, as the report says."""
    monkeypatch.chdir(tmp_path)
    names = ("model", "tasks", "output")
    paths = {name: os.path.relpath(getattr(config, name)) for name in names}
    relative = config.replace(adapters="a=adapters/a,adapters/b,c=adapters/c", **paths)
    session = run(relative, quiet=True)
    assert Run(relative).finished("pack")
    assert "<code>d2c-mlx run --output .</code>" in session.path("report.html").read_text()
    monkeypatch.chdir(tmp_path / "run")
    before = stages_started(Path())
    again = load_config(Path("config.yaml"), {"output": "."})
    run(again, quiet=True)
    assert Run(again).finished("pack") and stages_started(Path()) == before


def test_given_clusters_are_merged_by_any_method(config, tmp_path):
    given = tmp_path / "clusters.json"
    given.write_text(json.dumps([["c", "a"], ["b"]]))
    ties = config.replace(clusters=str(given), merge_method="ties")
    session = run(ties, "pack", quiet=True)
    (result,) = session.read("clusters.json")["methods"]["d2c"]
    assert result["labels"] == [0, 1, 0] and result["stopped"] == "given"
    assert {merge["method"] for merge in session.read("merges.json")} == {"ties", "none"}
    # What a run wrote is read too.
    session.path("clusters.json").rename(given)
    (again,) = run(ties, "cluster", quiet=True).read("clusters.json")["methods"]["d2c"]
    assert again["labels"] == [0, 1, 0]
    given.write_text(json.dumps([["a"], ["a", "d"], ["b"]]))
    with pytest.raises(InputError) as error:
        run(ties.replace(seed=1), quiet=True)
    assert [line.split(": ", 2)[2] for line in error.value.problems] == [
        "a, d: no adapter, or there twice",
        "c: in no cluster",
        "found 3 clusters, expected at most 2, for which the budget has room",
    ]


def test_answers_are_counted_with_an_interval():
    """Half of eight: 4/8 lies between 21.5 and 78.5 %, by Wilson's formula as in R's prop.test."""
    row = {"expected": "Ja", "individual": "ja ", "base": "no"}
    rows = [{**row, "pack": "ja" if i % 2 else "nein"} for i in range(8)]
    assert answered({"answers": {"a": rows[:4], "b": rows[4:], "texts": []}}) == (
        "Of 8 answers to held-out rows 8 of the adapters are as expected, 4 of the pack (95%"
        " interval 21.5% to 78.5%), 0 of the base model. So few answers tell little."
    )
    assert answered({}) == answered({"answers": {"texts": []}}) == ""
