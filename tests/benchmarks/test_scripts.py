"""Scripts that no other test runs, each once on a tiny library, so that none rots."""

import functools
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny import library, task, write_jsonl

from benchmarks import common
from benchmarks.quality import without_rows
from benchmarks.speed import plans
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import is_prompt, prompt_key
from d2c_mlx.models.tasks import load_task
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow

NAMES = ["date-en", "gec-en", "num-de", "qa-de"]
# Module -> its options beside the library's; `{root}` is where the library and a run of it are.
SCRIPTS = {
    "quality.order": "--library {root} --orders 1 --slots 2 --budget 95 --tests 2",
    "new_task.compose": "--library {root} --tasks date-en --draws 0 --methods best;arithmetic"
    " --tests 2 --answers 1",
    "quality.bytes": "--library {root} --budgets 50 --examples 2 --tests 2",
    "speed.plans": "--library {root} --budgets 60 --examples 2 --tests 2 --refine"
    " --packs {root}/packs",
    "quality.without_rows": "--library {root} --budgets 2 --tests 2",
    "speed.search": "--sizes= --alone 60",
    "serving.route": "--library {root}",
    "serving.routers": "--library {root} --pack {root}/run/pack --tests 1",
    "formats.peft_pack": "--run {root}/run",
    "chain": "--library {root} --model {root}/model --budgets 2,50% --examples 2 --tests 2",
}
# Module -> arguments of its `measure` after the library, and keys of what it returns.
PARTS = {
    "speed.evaluations": ((2, 2, 2), {"evaluations_asked", "evaluations_done", "d2c_merges"}),
    "speed.growth": (((3, 4), 2, 200), {"growth"}),
    "speed.engine": ((2, 2, 1), {"seconds", "max_loss_difference", "speedup_vs_peft"}),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A library, and a run of it."""
    root = tmp_path_factory.mktemp("scripts")
    found = library(root, NAMES)
    for name in NAMES:
        task(found.tasks, name, n_probe=12)
        rows = [{"prompt": f"Say {i} as {name}", "completion": f"{i}"} for i in range(4)]
        write_jsonl(found.tasks / name / "train.jsonl", rows)
    run(
        RunConfig(
            model=str(found.model), adapters=str(found.adapters), tasks=str(found.tasks),
            budget="2", probe_examples=2, test_examples=2, output=str(root / "run"),
        ), quiet=True,
    )  # fmt: skip
    return found


@pytest.fixture
def imported(paths, monkeypatch):
    """Import a script, with the tiny model where it would take the embedded one."""

    def module(name):
        found = importlib.import_module(f"benchmarks.{name}")

        def tiny(_=None):
            return Model(str(paths.model))

        for where in (found, common):
            if hasattr(where, "Model"):
                monkeypatch.setattr(where, "Model", tiny)
        if hasattr(found, "RunConfig"):
            config = functools.partial(RunConfig, model=str(paths.model))
            monkeypatch.setattr(found, "RunConfig", config)
        return found

    monkeypatch.delenv("D2C_MLX_CACHE", raising=False)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_prints_and_writes(imported, paths, monkeypatch, tmp_path, capsys, name):
    module = imported(name)
    words = SCRIPTS[name].format(root=paths.tasks.parent).split()
    result = tmp_path / "result.json"
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [name, *words, "--output", str(result)])
    module.main()
    assert json.loads(result.read_text()) and capsys.readouterr().out


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_probe_script_measures(imported, paths, name):
    arguments, keys = PARTS[name]
    found = imported(name).measure(paths.tasks.parent, *arguments)
    assert keys <= found.keys()
    assert json.dumps(found)


def test_prompts_of_rows_are_those_that_a_run_takes(paths, tmp_path):
    folder = Path(without_rows.write_prompts(paths.adapters.parent, tmp_path / "prompts"))
    for name in NAMES:
        asked = load_task(folder / name, prompts=True)
        rows = [prompt_key(row) for row in load_task(paths.tasks / name).probe]
        assert [prompt_key(row) for part in asked.asked.values() for row in part] == rows
        assert all(map(is_prompt, (*asked.probe, *asked.test)))


def test_plans_are_refined_on_prompts_of_other_rows_than_those_that_plan(paths, tmp_path):
    options = SimpleNamespace(library=paths.adapters.parent, budgets="60", examples=2, tests=2,
                              prompts=True)  # fmt: skip
    config = plans.config_of(options, tmp_path)
    assert config.refine and config.probe_examples == 2
    asked = {name: load_task(Path(config.tasks) / name, prompts=True).probe for name in NAMES}
    for name in NAMES:
        rows = [prompt_key(one) for one in load_task(paths.tasks / name).probe]
        assert [prompt_key(one) for one in asked[name]] == rows[2:]
