"""The whole pipeline on a tiny real model: results, resuming after a kill, what is repeated."""

import json
import re
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
from d2c_mlx.run import run as run_module
from d2c_mlx.run.config import load_config
from d2c_mlx.run.inputs import read_inputs
from d2c_mlx.utils.device import outside_mlx
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
def test_artifacts_and_the_shape_of_bench_json(config):
    session = run(config.replace(baselines=RIVALS), quiet=True)
    output, bench = session.output, session.read("bench.json")
    keys = {
        "methods",
        "rows",
        "n_held_out",
        "rivals",
        "plan",
        "interval",
        "answers",
        "metrics",
        "unpacked_nbytes",
        "provenance",
    }
    assert set(bench) == keys
    methods = bench["methods"]
    assert list(methods) == ["base", "individual", *RIVALS, "d2c", "pack"]
    for method in methods.values():
        assert set(method["tasks"]) == set(NAMES)
        mean = sum(task["loss"] for task in method["tasks"].values()) / len(NAMES)
        assert method["loss"] == pytest.approx(mean)
        for name, task in method["tasks"].items():
            own, bare = (methods[m]["tasks"][name]["loss"] for m in ("individual", "base"))
            assert task["excess"] == pytest.approx(task["loss"] - own, abs=1e-12)
            share = (bare - task["loss"]) / (bare - own) if bare - own > 1e-6 else None
            assert task["retention"] == (share and pytest.approx(share))
    assert methods["pack"] == methods["d2c"]
    rivals = session.read("bench.json")["rivals"]
    assert set(rivals) == {*RIVALS}
    for name, pair in rivals.items():
        difference = methods["pack"]["loss"] - methods[name]["loss"]
        assert pair["difference"] == pytest.approx(difference, abs=1e-6)
        assert pair["low"] <= pair["difference"] <= pair["high"]
    manifest = json.loads((output / "pack" / "manifest.json").read_text())
    files = [f for f in (output / "pack").rglob("*") if f.is_file() and f.name != "manifest.json"]
    assert sum(file.stat().st_size for file in files) == manifest["nbytes"]
    assert len({manifest["tasks"][name] for name in NAMES}) == 2
    record = json.loads((output / ".stages" / "probe.json").read_text())
    assert 0 < record["peak_nbytes"] <= session.library.scorer.engine.memory_limit
    assert record["process_peak_nbytes"] > record["peak_nbytes"]
    # Four tasks under the base and their own adapter at three strengths.
    assert record["evaluations"]["asked"] == 4 * 4
    cosines = np.array(session.read("losses.json")["similarity"])
    assert (np.diagonal(cosines) == 1).all() and (cosines == cosines.T).all()
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert f"{manifest['nbytes']:,}" in text and f"{methods['kmeans']['loss']:.4f}" in text
        assert re.search(r"Peak memory: MLX [\d.]+ [KM]B, the whole process [\d.]+ [MG]B", text)


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
@pytest.mark.parametrize(
    ("narrow", "budget", "n"), [(10, "2", 25), (0, "2", 40), (0.02, "100%", 25)]
)
def test_bench_measures_as_many_rows_as_the_interval_needs(
    config, tmp_path, monkeypatch, narrow, budget, n
):
    """Copies, for all bytes, lose nothing: their interval is from 0 to 0."""
    for name in NAMES:
        rows = [{"prompt": f"what is {i}?", "completion": f"Answer {i}."} for i in range(44)]
        write_jsonl(tmp_path / "more" / name / "probe.jsonl", rows[:4])
        write_jsonl(tmp_path / "more" / name / "test.jsonl", rows[4:])
    monkeypatch.setattr("d2c_mlx.run.stages._NARROW", narrow)
    config = config.replace(tasks=str(tmp_path / "more"), budget=budget, test_examples=0)
    config = config.replace(merge_method="linear")
    bench = run(config, quiet=True).read("bench.json")
    assert {len(rows) for rows in bench["rows"].values()} == {n}
    assert bench["n_held_out"] == 40 * len(NAMES)
    rows = np.array(list(bench["rows"].values()))
    losses = rows[..., 0].sum(axis=1) / rows[..., 1].sum(axis=1)
    assert bench["methods"]["pack"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)


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


def test_the_memory_limit_is_that_of_the_process(config, monkeypatch):
    monkeypatch.setenv("D2C_MLX_MEMORY_LIMIT", "16GB")
    monkeypatch.setattr("d2c_mlx.utils.device._STEP", 1 << 20)
    before = read_inputs(config).library.scorer.engine.memory_limit
    assert before == pytest.approx(16_000_000_000 - outside_mlx(), abs=32 << 20)
    ballast = np.ones(8_000_000)
    assert read_inputs(config).library.scorer.engine.memory_limit <= before - (32 << 20)
    monkeypatch.setattr("sys.platform", "darwin")  # which asks ps
    assert outside_mlx() > ballast.nbytes


@pytest.mark.parametrize("budget", ["1", "100%"])
def test_one_cluster_and_one_each(config, budget):
    config = config.replace(budget=budget, baselines=("merge-all",))
    warned = pytest.warns(InputWarning, match=f"budget: {budget} has room for all adapters .4., so")
    with nullcontext() if budget == "1" else warned:
        session = run(config, quiet=True)
    bench = session.read("bench.json")["methods"]
    same = "merge-all" if budget == "1" else "individual"
    assert bench["pack"]["loss"] == pytest.approx(bench[same]["loss"], abs=1e-6)
    if budget == "100%":  # copies
        pack = load_pack(session.output)
        assert [pack.load(x.name).digest for x in session.library.adapters] == [
            x.digest for x in session.library.adapters
        ]


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


def test_a_pack_of_another_making_is_not_replaced(config, tmp_path):
    pack = run(config, "pack", quiet=True).path("pack")
    other = config.replace(output=str(tmp_path / "other"))
    shutil.copytree(pack, tmp_path / "other" / "pack")
    with pytest.raises(InputError, match="other/pack, which no earlier run wrote"):
        run(other, quiet=True)
    assert not (tmp_path / "other" / ".stages").exists()


@pytest.mark.slow
def test_a_pack_of_which_a_kill_left_no_record_is_made_anew(config, monkeypatch):
    """Between the rename and the record, with other options than the last pack's."""
    output = run(config, "pack", quiet=True).output
    write, more = run_module.write_json, config.replace(budget="3")

    def killed(path, content):
        if path.name == "pack.json" and "expected" not in content:
            raise KeyboardInterrupt
        write(path, content)

    for options in (more, config):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_module, "write_json", killed)
            run(options, "pack", quiet=True)
        if options is more:
            expected = hash_tree(output / "pack")
            assert hash_tree(run(more, "pack", quiet=True).path("pack")) == expected
    # Killed there again, and the pack is changed before the run goes on.
    remove_tasks(load_pack(output / "pack"), ["a"])
    for options in (config, more):
        refused(options)


def test_a_long_list_of_adapters_goes_on_after_a_kill_and_without_its_options(config, monkeypatch):
    """What a run writes it can read: before its first record, and for `--output` alone."""
    listed = ",".join(f"{config.adapters}/{'./' * 1900}{name}" for name in NAMES)
    config = config.replace(adapters=listed)
    output = Path(config.output)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "write_json", killed)
        run(config, quiet=True)
    assert not (output / ".stages").exists()
    run(config, until="probe", quiet=True)
    done = load_config(output / "config.yaml", {})
    assert done.replace(adapters=config.adapters) == config
    assert run(done, until="cluster", quiet=True).output == output
    assert not (output / "merged").exists()


@pytest.mark.parametrize("name", [".lock", ".stages", ".config.yaml.tmp", ".losses.json.tmp"])
def test_a_link_in_a_run_that_somebody_sent_leads_no_write_out_of_it(config, tmp_path, name):
    output, mine = tmp_path / "run", tmp_path / "mine"
    output.mkdir()
    if name == ".stages":
        mine.mkdir()
        (mine / "probe.json").write_text("mine")
    else:
        mine.write_text("mine")
    (output / name).symlink_to(mine)
    refuses = pytest.raises(D2CError, match=rf"run/{name}: is ")
    with refuses if name in (".lock", ".stages") else nullcontext():
        run(config, "probe", quiet=True)
    kept = [mine] if mine.is_file() else list(mine.iterdir())
    assert [path.read_text() for path in kept] == ["mine"]
