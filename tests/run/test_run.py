"""The whole pipeline on a tiny real model: results, resuming after a kill, what is repeated."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import NAMES, stages_started

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.run import run as run_module
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.run.inputs import read_inputs
from d2c_mlx.utils.device import outside_mlx
from d2c_mlx.utils.errors import InputError, InputWarning, PackError
from d2c_mlx.utils.files import hash_tree


@pytest.mark.slow
def test_artifacts_and_the_shape_of_bench_json(config):
    session = run(config, quiet=True)
    output = session.output
    bench = json.loads((output / "bench.json").read_text())
    keys = {"methods", "rows", "interval", "answers", "metrics", "unpacked_nbytes", "provenance"}
    assert set(bench) == keys
    methods = bench["methods"]
    assert set(methods) == {"base", "individual", "merge-all", "random", "kmeans", "d2c", "pack"}
    for method in methods.values():
        assert set(method) == {"nbytes", "loss", "excess", "retention", "tasks"}
        assert set(method["tasks"]) == set(NAMES)
        mean = sum(task["loss"] for task in method["tasks"].values()) / len(NAMES)
        assert method["loss"] == pytest.approx(mean)
        for name, task in method["tasks"].items():
            own, bare = (methods[m]["tasks"][name]["loss"] for m in ("individual", "base"))
            assert task["excess"] == pytest.approx(task["loss"] - own, abs=1e-12)
            if bare - own > 1e-6:
                assert task["retention"] == pytest.approx((bare - task["loss"]) / (bare - own))
            else:
                assert task["retention"] is None
    assert methods["pack"] == methods["d2c"]
    assert methods["random"]["nbytes"] == methods["kmeans"]["nbytes"] == methods["d2c"]["nbytes"]
    manifest = json.loads((output / "pack" / "manifest.json").read_text())
    files = [f for f in (output / "pack").rglob("*") if f.is_file() and f.name != "manifest.json"]
    assert sum(file.stat().st_size for file in files) == manifest["nbytes"]
    assert manifest["base"]["config_sha256"] == session.library.base.config_hash
    assert len({manifest["tasks"][name] for name in NAMES}) == 2
    record = json.loads((output / ".stages" / "probe.json").read_text())
    assert 0 < record["peak_nbytes"] <= session.library.scorer.engine.memory_limit
    assert record["process_peak_nbytes"] > record["peak_nbytes"]
    # Four tasks under the base and their own adapter at three strengths.
    assert record["evaluations"]["asked"] == 4 * 4
    table = json.loads((output / "losses.json").read_text())
    assert len(table["individual"]) == len(table["weakened"]) == 4
    cosines = np.array(table["similarity"])
    assert cosines.shape == (4, 4) and (np.diagonal(cosines) == 1).all()
    assert (cosines == cosines.T).all() and (cosines < 1).sum() == 12
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert f"{manifest['nbytes']:,}" in text
        assert f"{methods['kmeans']['loss']:.4f}" in text
        assert re.search(r"Peak memory: MLX [\d.]+ [KM]B, the whole process [\d.]+ [MG]B", text)


@pytest.mark.parametrize("budget", ["2", "60%"])
def test_a_run_repeats_nothing_and_resumes_from_any_stage(config, budget):
    """The same pack, whichever record of a stage is lost; nothing is loaded for a finished run."""
    config = config.replace(budget=budget, baselines=(), merge_method="linear")
    output = run(config, quiet=True).output
    packed, started = hash_tree(output / "pack"), stages_started(output)
    again = run(config, quiet=True)
    assert "inputs" not in vars(again) and stages_started(output) == started
    for stage in ("probe", "plan" if budget == "60%" else "cluster"):
        (output / ".stages" / f"{stage}.json").unlink()
        run(config, quiet=True)
        later = {name for name, at in stages_started(output).items() if at != started[name]}
        assert later == {stage} and hash_tree(output / "pack") == packed
        started = stages_started(output)


def test_the_memory_limit_is_that_of_the_process(config, monkeypatch):
    monkeypatch.setenv("D2C_MLX_MEMORY_LIMIT", "16GB")
    before = read_inputs(config).library.scorer.engine.memory_limit
    assert before == 16_000_000_000 - outside_mlx()
    ballast = np.ones(75_000_000)
    assert read_inputs(config).library.scorer.engine.memory_limit <= before - (256 << 20)
    monkeypatch.setattr("sys.platform", "darwin")  # which asks ps
    assert outside_mlx() > ballast.nbytes


def test_report_html_is_self_contained(config):
    text = (run(config, quiet=True).output / "report.html").read_text()
    assert text.count("<script") == 1 and "content=\"default-src 'none'; " in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']https?:""", text)
    assert text.count("<svg") >= 2 and text.count("aria-label") >= 5


@pytest.mark.slow
def test_second_run_repeats_nothing_and_a_change_only_what_follows(config):
    output = run(config, quiet=True).output
    first = stages_started(output)
    run(config, quiet=True)
    assert stages_started(output) == first

    (output / "clusters.json").write_text("{}")
    run(config, quiet=True)
    again = stages_started(output)
    assert {name for name in again if again[name] != first[name]} == {"cluster"}

    probe = Path(config.tasks) / "a" / "probe.jsonl"
    rows = probe.read_text().splitlines()
    probe.write_text("\n".join(reversed(rows)) + "\n")
    run(config, quiet=True)
    kept = {name for name, time in stages_started(output).items() if time == again[name]}
    assert {"convert"} == kept - {"merge", "pack", "bench", "report"}


def test_baselines_are_those_that_are_asked_for(config):
    output = run(config.replace(baselines=("kmeans",)), quiet=True).output
    few = json.loads((output / "bench.json").read_text())["methods"]
    assert set(few) == {"base", "individual", "kmeans", "d2c", "pack"}
    first = stages_started(output)
    run(config.replace(baselines=()), quiet=True)
    none = json.loads((output / "bench.json").read_text())["methods"]
    assert none == {name: few[name] for name in few if name != "kmeans"}
    changed = {name for name, time in stages_started(output).items() if time != first[name]}
    assert changed == {"bench", "report"}


def test_another_merge_that_is_clustered_alike_is_not_clustered_again(config):
    output = run(config, until="merge", quiet=True).output
    first = stages_started(output)
    run(config.replace(merge_method="regmean++"), until="merge", quiet=True)
    changed = {name for name, time in stages_started(output).items() if time != first[name]}
    assert changed == {"merge"}
    run(config.replace(merge_method="linear"), until="cluster", quiet=True)
    assert stages_started(output)["cluster"] != first["cluster"]


def test_until_stops_after_the_stage(config):
    output = run(config, until="cluster", quiet=True).output
    assert (output / "clusters.json").exists()
    assert not (output / "merged").exists()


@pytest.mark.parametrize("budget", ["1", "4", "9", "100%"])
def test_one_cluster_and_one_each(config, budget):
    config = config.replace(budget=budget)
    said = pytest.warns(InputWarning, match=f"budget: {budget} has room for all adapters .4., so")
    with nullcontext() if budget == "1" else said:
        output = run(config, quiet=True).output
    bench = json.loads((output / "bench.json").read_text())["methods"]
    same = "merge-all" if budget == "1" else "individual"
    assert bench["pack"]["loss"] == pytest.approx(bench[same]["loss"], abs=1e-6)


def test_mixed_ranks_modules_and_ties(config):
    """Adapters of other ranks and modules beside each other, merged by TIES."""
    from helpers.tiny import peft_adapter

    for name, rank in (("b", 2), ("c", 6)):
        shutil.rmtree(Path(config.adapters) / name)
        peft_adapter(Path(config.adapters), name, rank=rank, seed=rank)
    options = {**config.to_dict(), "search": "paper", "merge_method": "ties"}
    output = run(RunConfig(**options), quiet=True).output
    merges = json.loads((output / "merges.json").read_text())
    assert sorted(name for entry in merges for name in entry["members"]) == NAMES
    assert {entry["method"] for entry in merges} <= {"ties", "none"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["adapters", "merged", "pack"])
def test_interrupted_while_writing_a_directory(config, monkeypatch, stage):
    """An interrupt in the middle of a directory leaves none, and the next run makes it whole."""
    from d2c_mlx.adapters.adapter import Adapter

    save, calls = Adapter.save, []

    def interrupted(self, directory, n_layers):
        save(self, directory, n_layers)
        if f"/.{stage}." in str(directory):
            calls.append(directory)
            raise KeyboardInterrupt

    monkeypatch.setattr(Adapter, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, quiet=True)
    monkeypatch.undo()
    assert calls and not (Path(config.output) / stage).exists()
    output = run(config, quiet=True).output
    assert (output / stage).exists() and not list(output.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2", "50%"])
def test_a_pack_that_was_changed_is_not_undone(config, budget):
    """By no stage, with no options, nor one that is damaged; what is missing is made anew."""
    config = config.replace(budget=budget)
    output = run(config, quiet=True).output
    made = hash_tree(output / "pack")
    remove_tasks(load_pack(output / "pack"), ["a"])
    changed, started = hash_tree(output / "pack"), stages_started(output)
    for until, options in (
        ("pack", {}), ("bench", {}), ("report", {}), ("report", {"budget": "60%", "seed": 1})
    ):  # fmt: skip
        with pytest.raises(PackError, match="pack: is not the pack that .* move it") as caught:
            run(config.replace(**options), until, quiet=True)
        assert len(caught.value.problems) == 1
        assert hash_tree(output / "pack") == changed and stages_started(output) == started
    run(config, "plan" if "%" in budget else "merge", quiet=True)
    (output / "pack").rename(output / "mine")
    run(config, quiet=True)
    assert (hash_tree(output / "pack"), hash_tree(output / "mine")) == (made, changed)
    for name in ("manifest.json", next(iter(load_pack(output / "pack").manifest.files))):
        (output / "pack" / name).write_bytes(b"damaged")
        with pytest.raises(PackError, match="pack: is not the pack that .* move it"):
            run(config, quiet=True)
        shutil.rmtree(output / "pack")
        assert hash_tree(run(config, quiet=True).path("pack")) == made
    (output / "pack" / ".DS_Store").write_bytes(b"of a Mac")
    assert hash_tree(run(config, quiet=True).path("pack")) == made


def test_a_pack_of_another_making_is_not_replaced(config, tmp_path):
    pack = run(config, "pack", quiet=True).path("pack")
    other = config.replace(output=str(tmp_path / "other"))
    shutil.copytree(pack, tmp_path / "other" / "pack")
    with pytest.raises(InputError, match="other/pack, which no earlier run wrote"):
        run(other, quiet=True)
    assert not (tmp_path / "other" / ".stages").exists()
    (tmp_path / "other" / "pack").rename(tmp_path / "kept")
    run(other, "merge", quiet=True)
    (tmp_path / "kept").rename(tmp_path / "other" / "pack")
    with pytest.raises(PackError, match="pack: is not the pack that this run made"):
        run(other, quiet=True)


@pytest.mark.slow
def test_a_pack_of_which_a_kill_left_no_record_is_made_anew(config, monkeypatch):
    """Between the rename and the record, with other options than the last pack's."""
    output = run(config, "pack", quiet=True).output
    write = run_module.write_json

    def killed(path, content):
        if path.name == "pack.json" and "expected" not in content:
            raise KeyboardInterrupt
        write(path, content)

    more = config.replace(budget="3")
    monkeypatch.setattr(run_module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run(more, "pack", quiet=True)
    monkeypatch.undo()
    made = hash_tree(output / "pack")
    assert hash_tree(run(more, "pack", quiet=True).path("pack")) == made
    # Killed there again, and the pack is changed before the run goes on.
    monkeypatch.setattr(run_module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, "pack", quiet=True)
    monkeypatch.undo()
    remove_tasks(load_pack(output / "pack"), ["a"])
    changed = hash_tree(output / "pack")
    for options in (config, more):
        with pytest.raises(PackError, match="is not the pack that this run made"):
            run(options, "pack", quiet=True)
    assert hash_tree(output / "pack") == changed


def test_a_long_list_of_adapters_goes_on_after_a_kill_and_without_its_options(config, monkeypatch):
    """What a run writes it can read: before its first record, and for `--output` alone."""
    listed = ",".join(f"{config.adapters}/{'./' * 4000}{name}" for name in NAMES)
    config = config.replace(adapters=listed)
    output = Path(config.output)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "write_json", killed)
        run(config, quiet=True)
    assert len((output / "config.yaml").read_text()) > 30_000
    assert not (output / ".stages").exists()
    run(config, until="probe", quiet=True)
    done = load_config(output / "config.yaml", {})
    assert done.replace(adapters=config.adapters) == config
    assert run(done, until="cluster", quiet=True).output == output
