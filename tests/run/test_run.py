"""The whole pipeline on a tiny real model: forecast, results, resuming, what is repeated."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import NAMES, config_of, flags_of, stages_started
from helpers.tiny import library, task

from d2c_mlx.forecast import forecast
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.report.report import next_commands, verdict
from d2c_mlx.run import run as run_module
from d2c_mlx.run.run import Run
from d2c_mlx.utils.errors import D2CError, InputError, InputWarning, PackError
from d2c_mlx.utils.files import hash_tree

RIVALS = ("merge-all", "random", "kmeans")


def since(output, first):
    """Stages that ran after `first` was taken."""
    return {name for name, at in stages_started(output).items() if at != first.get(name)}


def refused(config, until="pack"):
    with pytest.raises(PackError, match="pack: is not the pack that this run made.* move it"):
        run(config, until, quiet=True)


@pytest.mark.slow
def test_artifacts_and_the_numbers_of_bench_json(config):
    session = run(config.replace(baselines=RIVALS), quiet=True)
    methods = (bench := session.read("bench.json"))["methods"]
    assert list(methods) == ["base", "individual", *RIVALS, "d2c", "pack"]
    for method in methods.values():
        losses = [method["tasks"][name]["loss"] for name in NAMES]
        assert method["loss"] == pytest.approx(np.mean(losses))
        for name, result in method["tasks"].items():
            own, bare = (methods[m]["tasks"][name]["loss"] for m in ("individual", "base"))
            assert result["excess"] == pytest.approx(result["loss"] - own, abs=1e-12)
            share = (bare - result["loss"]) / (bare - own) if bare - own > 1e-6 else None
            assert result["kept"] == (share and pytest.approx(share))
    assert methods["pack"] == methods["d2c"]
    assert set(bench["rivals"]) == {*RIVALS}
    for name, pair in bench["rivals"].items():
        difference = methods["pack"]["loss"] - methods[name]["loss"]
        assert pair["low"] <= pair["difference"] == pytest.approx(difference, abs=1e-6)
    record = json.loads((session.output / ".stages" / "probe.json").read_text())
    peak = record["peak_nbytes"]
    assert 0 < peak <= session.library.scorer.engine.memory_limit
    assert record["process_peak_nbytes"] > peak
    few = "too few to tell."
    sure, same = "best rival, by 0.0031 nats.", "rival, kmeans, chose the same clusters."
    for x, low, high, words in (
        (31, -1, 2, few), (31, 0, 0, few), (31, 1, 2, sure), (0, 0, 0, same), (0, -1, 1, few)
    ):  # fmt: skip
        rivals = {"kmeans": {"difference": x / 10_000, "low": low, "high": high}}
        assert words in verdict({**bench, "rivals": rivals})
    # Four tasks under the base and their own adapter at three strengths.
    assert record["evaluations"]["asked"] == 4 * 4
    cosines = np.array(session.read("losses.json")["similarity"])
    assert (np.diagonal(cosines) == 1).all() and (cosines == cosines.T).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:budget")
@pytest.mark.parametrize("narrow, budget, n", [(0, "2", 40), (0.02, "100%", 25)])
def test_bench_measures_as_many_rows_as_the_interval_needs(
    config, tmp_path, monkeypatch, narrow, budget, n
):
    """Copies, for all bytes, lose nothing: their interval is from 0 to 0."""
    for name in NAMES:
        rows = [{"prompt": f"what is {i}?", "completion": f"Answer {i}."} for i in range(44)]
        task(tmp_path / "more", name, rows=rows)
    monkeypatch.setattr("d2c_mlx.run.stages._NARROW", narrow)
    options = {"budget": budget, "test_examples": 0, "merge_method": "linear"}
    config = config.replace(tasks=str(tmp_path / "more"), **options)
    bench = run(config, quiet=True).read("bench.json")
    assert {len(rows) for rows in bench["rows"].values()} == {n}
    assert bench["n_held_out"] == 40 * len(NAMES)


@pytest.mark.slow
def test_a_change_is_seen_and_repeats_only_what_follows(config):
    output = run(config, quiet=True).output
    assert Run(config).finished() and Run(config).finished("merge")
    rows, probe = (Path(config.tasks) / "a" / f"{name}.jsonl" for name in ("test", "probe"))
    packed = hash_tree(output / "pack")
    bench = json.loads((output / "bench.json").read_text())

    def repeated(**options):
        changed, first = config.replace(**options), stages_started(output)
        assert not Run(changed).finished()
        bench.update(run(changed, quiet=True).read("bench.json"))
        assert Run(changed).finished()
        return since(output, first)

    # Damaged records, too.
    for stage, content in (("probe", b'{"inputs": "a'), ("cluster", b'{"inputs": null}'),
                           ("merge", b"\xff")):  # fmt: skip
        (output / ".stages" / f"{stage}.json").write_bytes(content)
        assert repeated() == {stage} and hash_tree(output / "pack") == packed
    os.utime(rows)  # stages judge by content, but the page that is opened
    assert repeated() == {"report"}
    (output / "clusters.json").write_text("{}")
    assert repeated() == {"cluster"}
    methods = bench["methods"]
    (output / "bench.json").write_text("{")
    assert "bench" in repeated() <= {"bench", "report"} and bench["methods"] == methods
    assert repeated(baselines=("kmeans",)) == {"bench", "report"}
    assert set(bench["methods"]) == {"base", "individual", "kmeans", "d2c", "pack"}
    assert {"cluster", "merge"} <= repeated(merge_method="regmean++")
    # Methods that cluster alike share their clusters.
    assert "merge" in repeated(merge_method="regmean") <= {"merge", "pack", "bench", "report"}
    every = {"cluster", "merge", "pack", "bench", "report"}
    assert "cluster" in repeated(merge_method="linear") <= every
    # mlx-lm takes the ends of answers from this file first.
    ends = {"eos_token_id": [*range(3, 300, 2)]}
    (Path(config.model) / "generation_config.json").write_text(json.dumps(ends))
    assert repeated(merge_method="linear") >= {"bench", "report"}
    fresh = run(config.replace(merge_method="linear", output=f"{output}-fresh"), quiet=True)
    assert fresh.read("bench.json")["answers"] == bench["answers"]
    probe.write_text("\n".join(reversed(probe.read_text().splitlines())) + "\n")
    assert "probe" in repeated(merge_method="linear") <= since(output, {}) - {"convert"}


@pytest.mark.parametrize("budget", ["1", "100%"])
def test_one_cluster_and_one_each(config, budget):
    config = config.replace(budget=budget, baselines=("merge-all",))
    warned = pytest.warns(InputWarning, match=f"budget: {budget} has room for all adapters .4., so")
    with nullcontext() if budget == "1" else warned:
        session = run(config, quiet=True)
    bench = session.read("bench.json")["methods"]
    same = "merge-all" if budget == "1" else "individual"
    assert bench["pack"]["loss"] == pytest.approx(bench[same]["loss"], abs=1e-6)
    assert Run(config).finished()
    if budget == "100%":  # copies
        pack = load_pack(session.output)
        assert all(pack.load(x.name).digest == x.digest for x in session.library.adapters)


@pytest.mark.slow
def test_a_pack_that_was_changed_is_not_undone(config):
    """By no stage, with no options, nor one that is damaged; what is missing is made anew."""
    config = config.replace(merge_method="linear")
    output = run(config, quiet=True).output
    pack, original = output / "pack", hash_tree(output / "pack")
    remove_tasks(load_pack(pack), ["a"])
    changed, started = hash_tree(pack), stages_started(output)
    for until, options in (("pack", {}), ("bench", {}), ("report", {"budget": "60%", "seed": 1})):
        refused(config.replace(**options), until)
        assert hash_tree(pack) == changed and stages_started(output) == started
    run(config, "merge", quiet=True)
    pack.rename(output / "mine")
    run(config, "pack", quiet=True)
    assert (hash_tree(pack), hash_tree(output / "mine")) == (original, changed)
    for name in ("manifest.json", "thesis.txt", "router.safetensors"):
        (pack / name).write_bytes(b"damaged, or the user's")
        refused(config)
        shutil.rmtree(pack)
        assert hash_tree(run(config, "pack", quiet=True).path("pack")) == original
    (pack / ".DS_Store").write_bytes(b"of a Mac")
    assert hash_tree(run(config, quiet=True).path("pack")) == original
    # Without its record nothing tells who made a pack.
    (output / ".stages" / "pack.json").write_bytes(b"[]")
    refused(config)


@pytest.mark.slow
def test_a_pack_of_which_a_kill_left_no_record_is_made_anew(config, monkeypatch):
    """Between the rename and the record, with other options than the last pack's."""
    output = run(config, "pack", quiet=True).output
    write, more = run_module.write_json, config.replace(budget="3")

    def killed(path, content):
        if path.name == "pack.json" and "expected" not in content:
            raise KeyboardInterrupt
        write(path, content)

    def run_to_the_kill(options):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_module, "write_json", killed)
            run(options, "pack", quiet=True)
        return hash_tree(output / "pack")

    expected = run_to_the_kill(more)
    assert hash_tree(run(more, "pack", quiet=True).path("pack")) == expected
    run_to_the_kill(config)
    # The pack is changed before the run goes on.
    remove_tasks(load_pack(output / "pack"), ["a"])
    for options in (config, more):
        refused(options)


@pytest.mark.parametrize("name", [".lock", ".stages", ".config.yaml.tmp", ".losses.json.tmp"])
def test_a_link_in_a_run_that_somebody_sent_leads_no_write_out_of_it(config, tmp_path, name):
    output, mine = tmp_path / "run", tmp_path / "mine"
    output.mkdir()
    (output / name).symlink_to(mine if name != ".stages" else tmp_path)
    mine.write_text("mine")
    refuses = pytest.raises(D2CError, match=rf"run/{name}: is ")
    with refuses if name in (".lock", ".stages") else nullcontext():
        run(config, "probe", quiet=True)
    assert mine.read_text() == "mine" and not (tmp_path / "convert.json").exists()


def test_commands_where_no_environment_is_active(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "env/bin/d2c-mlx")])
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert next_commands("my runs/1", "a", None, True)[2] == "env/bin/d2c-mlx serve 'my runs/1'"


def test_a_new_pack_does_not_stand_beside_an_old_report(config, capsys):
    session = run(config.replace(test_examples=1))
    head = capsys.readouterr().err
    assert head.startswith("found 4 adapters of model (")
    assert "3 calibration and 1 held-out rows each; budget: 2; device: cpu\n" in head
    assert session.read("bench.json")["interval"] == {"low": None, "high": None}
    assert "(no interval: a task has one held-out row" in session.path("report.html").read_text()
    run(config.replace(test_examples=1, budget="1"), "pack", quiet=True)
    assert not [path for path in session.output.iterdir() if path.stem in ("report", "bench")]


def test_given_clusters_are_merged_by_any_method(config, tmp_path):
    given = tmp_path / "clusters.json"
    given.write_text(json.dumps([["c", "a"], ["b", "d"]]))
    ties = config.replace(clusters=str(given), merge_method="ties")
    session = run(ties, "pack", quiet=True)
    (result,) = session.read("clusters.json")["methods"]["d2c"]
    assert result["labels"] == [0, 1, 0, 1] and result["stopped"] == "given"
    assert {merge["method"] for merge in session.read("merges.json")} == {"ties"}
    # What a run wrote is read too.
    session.path("clusters.json").rename(given)
    (again,) = run(ties, "cluster", quiet=True).read("clusters.json")["methods"]["d2c"]
    assert again["labels"] == [0, 1, 0, 1]
    given.write_text(json.dumps([["a"], ["a", "x"], ["b"]]))
    error = pytest.raises(InputError, run, ties.replace(seed=1), quiet=True)
    assert [line.split(": ", 2)[2] for line in error.value.problems] == [
        "a, x: no adapter, or there twice",
        "c, d: in no cluster",
        "found 3 clusters, expected at most 2, for which the budget has room",
    ]


WITHOUT_A_MODEL = """
import sys
sys.modules["mlx_lm"] = sys.modules["transformers"] = None
from d2c_mlx_cli.main import main
main()
"""


@pytest.mark.slow
def test_a_finished_run_answers_without_a_model(config):
    """In a process where none can even be imported."""
    config = config.replace(merge_method="linear")
    finished = run(config, quiet=True)
    assert "inputs" not in vars(run(config, quiet=True))
    times = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    output = f"--output={finished.output}"
    for words in (
        ["run", output],
        ["run", "--until", "bench", output],
        ["verify", finished.path("pack")],
        ["list", finished.path("pack")],
    ):
        argv = [sys.executable, "-c", WITHOUT_A_MODEL, *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "| individual |" in done.stdout or words[0] != "run"
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == times


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Six adapters, room for three, and an empty cache."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cold"))
    paths = library(tmp_path, list("abcdef"))
    return config_of(paths, tmp_path / "run", budget="3", baselines=("kmeans",))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"budget": "60%"}, {"merge_rank": 16, "search": "paper"}])
def test_a_run_does_about_what_was_forecast_and_then_nothing(six, changes):
    config = six.replace(**changes)
    before = forecast(config)
    assert None not in before.stages.values() and before.tokens_per_second > 0
    # The search makes the merges that ship.
    assert not before.stages.get("merge")
    session = run(config, quiet=True)
    for name in ("probe", "bench"):
        record = json.loads((session.output / ".stages" / f"{name}.json").read_text())
        tokens, expected = record["evaluations"]["tokens"], before.stages[name]
        assert expected >= tokens >= expected / 8, name
    files = session.path("pack").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= before.nbytes
    again = forecast(config)
    assert {*again.stages.values()} == {None} and again.seconds == 0
    stages = forecast(config.replace(merge_rank=3)).stages
    assert stages["probe"] is None and None not in (stages["pack"], stages["bench"])


def test_a_dry_run_writes_nothing(six, command):
    argv = ["run", "--dry-run", *flags_of(six)]
    code, out, _ = command(*argv)
    assert code == 0 and "3 adapters, at most" in out and "Nothing was written" in out
    code, _, err = command(*argv, "--budget", "100B")
    assert code == 2 and "budget" in err and not Path(six.output).exists()
