"""Refining as a stage of a run: what is packed, what is never touched, resuming, bad options."""

import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers.runs import config_of, stages_started
from helpers.tiny import peft_adapter, refinable, task

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.refine.refine import TrainOptions
from d2c_mlx.run import stages
from d2c_mlx.run.config import load_config
from d2c_mlx.utils.files import hash_tree

# A short training, in place of 40 steps at a low rate.
SHORT = partial(TrainOptions, steps=12, rate=5e-3)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "TrainOptions", SHORT)
    paths = refinable(tmp_path)
    for seed, name in enumerate(["c", "d"], 2):
        peft_adapter(paths.adapters, name, alpha=40, seed=seed)
        task(paths.tasks, name, n_probe=6)
    options = {"probe_examples": 6, "test_examples": 3, "merge_method": "linear"}
    return config_of(paths, tmp_path / "run", **options, refine=True)


@pytest.fixture
def planned(config):
    return config.replace(budget="45%", merge_method=None, baselines=[])


def check(facts, same):
    """A form is replaced where training brought it closer, and nowhere else."""
    assert any(fact["refined"] for fact in facts)
    for k, fact in enumerate(facts):
        at = fact["divergence"]
        assert fact["refined"] == (at["after"] < at["before"] - 1e-4) != same(k)


@pytest.mark.slow
def test_pipeline_packs_the_refined_and_off_packs_the_merge(config):
    off = run(config.replace(refine=False), quiet=True)
    assert not off.path("refined").exists() and not off.path("refines.json").exists()
    plain, d2c = hash_tree(off.path("pack")), off.read("bench.json")["methods"]["d2c"]
    # By itself, and packed later.
    run(config, until="refine", quiet=True)
    assert hash_tree(off.path("pack")) == plain
    on = run(load_config(off.path("config.yaml"), {}), quiet=True)
    facts, bench = on.read("refines.json"), on.read("bench.json")["methods"]
    assert [x["members"] for x in facts] == [x["members"] for x in on.read("merges.json")]
    check(facts, lambda k: hash_tree(on.path(f"refined/{k}")) == hash_tree(on.path(f"merged/{k}")))
    assert bench["d2c"] == d2c != bench["pack"] and not on.path("refining").exists()
    n = sum(fact["refined"] for fact in facts)
    assert f"Refined merges: {n} of " in on.path("report.html").read_text()
    again = run(config.replace(refine=False), quiet=True)
    assert hash_tree(again.path("pack")) == plain


def test_test_rows_are_never_touched(config):
    """Other held-out rows change no byte of what is refined."""
    first = run(config, until="refine", quiet=True)
    refined = hash_tree(first.path("refined"))
    for file in Path(config.tasks).glob("*/test.jsonl"):
        file.write_text(file.read_text().replace("Answer", "Another"))
    started = stages_started(first.output)
    again = run(config, until="refine", quiet=True)
    assert hash_tree(again.path("refined")) == refined
    assert {**stages_started(first.output), "finish": 0} == {**started, "finish": 0}


@pytest.mark.slow
@pytest.mark.parametrize("options", ["config", "planned"])
def test_stopped_it_goes_on_at_the_adapter_it_was_in(options, request, tmp_path, monkeypatch):
    """And where it stops once more, while it tidies up; SIGKILL is in robustness/test_crash.py."""
    config = request.getfixturevalue(options)
    whole = run(config, until="pack", quiet=True)
    assert not whole.path("refining").exists()
    config, remove = config.replace(output=str(tmp_path / "stopped")), shutil.rmtree
    refine = Mock(side_effect=stages.refine)
    done = iter([True])

    def first(*args):
        if not next(done, False):
            raise KeyboardInterrupt
        return refine(*args)

    def killed(path, *args, **kwargs):
        parts = sorted(Path(path).rglob("*.safetensors"))
        if "refining" in Path(path).name and parts:
            parts[0].unlink()
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    for owner, name, stop in ((stages, "refine", first), (shutil, "rmtree", killed)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, stop)
            run(config, until="pack", quiet=True)
        monkeypatch.setattr(stages, "refine", refine)
    again = run(config, until="pack", quiet=True)
    assert refine.call_count == len(whole.read("refines.json"))
    assert not again.path("refining").exists()
    for name in ("refined", "pack"):
        assert hash_tree(again.path(name)) == hash_tree(whole.path(name))


@pytest.mark.slow
def test_a_plan_is_refined_in_the_same_bytes(planned):
    off = run(planned.replace(refine=False), quiet=True)
    before, content = load_pack(off.path("pack")), off.read("plan.json")
    plain = off.read("bench.json")["methods"]["pack"]
    digests = {name: x.digest for name in before.tasks if (x := before.load(name))}
    on = run(planned, quiet=True)
    after, facts = load_pack(on.path("pack")), on.read("refines.json")
    assert on.read("plan.json") == content
    assert after.nbytes == before.nbytes and after.tasks == before.tasks
    assert [x["members"] for x in facts] == [unit["tasks"] for unit in content["units"]]
    check(facts, lambda k: all(after.load(x).digest == digests[x] for x in facts[k]["members"]))
    # The plan as it was, beside what refining made of it.
    methods = on.read("bench.json")["methods"]
    assert methods["plan"] == plain != methods["pack"]
