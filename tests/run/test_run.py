"""The whole pipeline on a tiny real model: results, their words, resuming, what is repeated."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import NAMES, stages_started
from helpers.tiny import write_jsonl

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.report.report import answered, next_commands, verdict
from d2c_mlx.run import run as run_module
from d2c_mlx.run.config import load_config
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
    output, bench = session.output, session.read("bench.json")
    methods = bench["methods"]
    assert list(methods) == ["base", "individual", *RIVALS, "d2c", "pack"]
    for method in methods.values():
        losses = [method["tasks"][name]["loss"] for name in NAMES]
        assert method["loss"] == pytest.approx(np.mean(losses))
        for name, task in method["tasks"].items():
            own, bare = (methods[m]["tasks"][name]["loss"] for m in ("individual", "base"))
            assert task["excess"] == pytest.approx(task["loss"] - own, abs=1e-12)
            share = (bare - task["loss"]) / (bare - own) if bare - own > 1e-6 else None
            assert task["retention"] == (share and pytest.approx(share))
    assert methods["pack"] == methods["d2c"]
    assert set(bench["rivals"]) == {*RIVALS}
    for name, pair in bench["rivals"].items():
        difference = methods["pack"]["loss"] - methods[name]["loss"]
        assert pair["difference"] == pytest.approx(difference, abs=1e-6)
        assert pair["low"] <= pair["difference"] <= pair["high"]
    record = json.loads((output / ".stages" / "probe.json").read_text())
    assert 0 < record["peak_nbytes"] <= session.library.scorer.engine.memory_limit
    assert record["process_peak_nbytes"] > record["peak_nbytes"]
    # Four tasks under the base and their own adapter at three strengths.
    assert record["evaluations"]["asked"] == 4 * 4
    cosines = np.array(session.read("losses.json")["similarity"])
    assert (np.diagonal(cosines) == 1).all() and (cosines == cosines.T).all()


@pytest.mark.parametrize(
    "budget, damage",
    [
        ("2", {"probe": b'{"inputs": "a', "cluster": b'{"inputs": null}'}),
        ("60%", {"plan": b"\xff"}),
    ],
)
def test_a_run_repeats_nothing_and_resumes_from_any_stage(config, budget, damage):
    """The same pack, whichever record is damaged; nothing is loaded for a finished run."""
    config = config.replace(budget=budget, merge_method="linear")
    output = run(config, quiet=True).output
    packed, started = hash_tree(output / "pack"), stages_started(output)
    again = run(config, quiet=True)
    assert "inputs" not in vars(again) and stages_started(output) == started
    for stage, content in damage.items():
        (output / ".stages" / f"{stage}.json").write_bytes(content)
        run(config, quiet=True)
        assert since(output, started) == {stage} and hash_tree(output / "pack") == packed
        started = stages_started(output)


@pytest.mark.filterwarnings("ignore:budget")
@pytest.mark.parametrize("narrow, budget, n", [(0, "2", 40), (0.02, "100%", 25)])
def test_bench_measures_as_many_rows_as_the_interval_needs(
    config, tmp_path, monkeypatch, narrow, budget, n
):
    """Copies, for all bytes, lose nothing: their interval is from 0 to 0."""
    for name in NAMES:
        rows = [{"prompt": f"what is {i}?", "completion": f"Answer {i}."} for i in range(44)]
        write_jsonl(tmp_path / "more" / name / "probe.jsonl", rows[:4])
        write_jsonl(tmp_path / "more" / name / "test.jsonl", rows[4:])
    monkeypatch.setattr("d2c_mlx.run.stages._NARROW", narrow)
    options = {"budget": budget, "test_examples": 0, "merge_method": "linear"}
    config = config.replace(tasks=str(tmp_path / "more"), **options)
    bench = run(config, quiet=True).read("bench.json")
    assert {len(rows) for rows in bench["rows"].values()} == {n}
    assert bench["n_held_out"] == 40 * len(NAMES)


@pytest.mark.slow
def test_a_change_repeats_only_what_follows(config):
    output = run(config, quiet=True).output
    first = stages_started(output)
    (output / "clusters.json").write_text("{}")
    run(config, quiet=True)
    assert since(output, first) == {"cluster"}
    again = stages_started(output)
    run(config.replace(baselines=("kmeans",)), quiet=True)
    methods = json.loads((output / "bench.json").read_text())["methods"]
    assert set(methods) == {"base", "individual", "kmeans", "d2c", "pack"}
    assert since(output, again) == {"bench", "report"}
    # Methods that cluster alike share their clusters.
    run(config.replace(merge_method="regmean++"), until="merge", quiet=True)
    assert since(output, again) == {"merge", "bench", "report"}
    run(config.replace(merge_method="linear"), until="cluster", quiet=True)
    assert "cluster" in since(output, again)
    probe = Path(config.tasks) / "a" / "probe.jsonl"
    probe.write_text("\n".join(reversed(probe.read_text().splitlines())) + "\n")
    run(config, quiet=True)
    assert "probe" in since(output, again) and "convert" not in since(output, again)


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


def test_a_long_list_of_adapters_goes_on_without_its_options(config):
    """What a run writes it can read for `--output` alone."""
    listed = ",".join(f"{config.adapters}/{'./' * 1900}{name}" for name in NAMES)
    output = run(config.replace(adapters=listed), until="probe", quiet=True).output
    done = load_config(output / "config.yaml", {})
    assert done.replace(adapters=config.adapters) == config
    assert run(done, until="cluster", quiet=True).output == output


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
    assert head.startswith("found 4 adapters of model (")
    assert "3 calibration and 1 held-out rows each; budget: 2; device: cpu\n" in head
    assert session.read("bench.json")["interval"] == {"low": None, "high": None}
    assert "(no interval: a task has one held-out row" in session.path("report.html").read_text()
    run(config.replace(test_examples=1, budget="1"), "pack", quiet=True)
    assert not [path for path in session.output.iterdir() if path.stem in ("report", "bench")]


def test_a_run_goes_on_from_another_directory(config, tmp_path, monkeypatch):
    """`d2c-mlx run --output .` in the directory of the report, as the report says."""
    monkeypatch.chdir(tmp_path)
    names = ("model", "tasks", "output")
    paths = {name: os.path.relpath(getattr(config, name)) for name in names}
    relative = config.replace(adapters="a=adapters/a,adapters/b,c=adapters/c,adapters/d", **paths)
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
    with pytest.raises(InputError) as error:
        run(ties.replace(seed=1), quiet=True)
    assert [line.split(": ", 2)[2] for line in error.value.problems] == [
        "a, x: no adapter, or there twice",
        "c, d: in no cluster",
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
