"""Every script is imported, says how it is called, and runs once on a tiny library."""

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT
from helpers.tiny import library, task, write_jsonl

from benchmarks import common
from benchmarks.quality import without_rows
from benchmarks.speed import plans
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import is_prompt, prompt_key
from d2c_mlx.models.tasks import load_task
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

FILES = [path for path in sorted(ROOT.glob("benchmarks/**/*.py")) if path.name != "__init__.py"]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
NAMES = ["date-en", "gec-en", "num-de", "qa-de"]
# Module -> its options; `{root}` is where the library and a run of it are.
SCRIPTS = {
    "quality.order": "--library {root} --orders 1 --slots 2 --budget 95 --tests 2",
    "new_task.compose": "--library {root} --tasks date-en --draws 0 --methods best;arithmetic"
    " --tests 2 --answers 1",
    "speed.plans": "--library {root} --budgets 60 --examples 2 --tests 2 --packs {root}/packs",
    "quality.without_rows": "--library {root} --budgets 2 --tests 2",
    "serving.routers": "--library {root} --pack {root}/run/pack --tests 1",
    "formats.peft_pack": "--run {root}/run",
    "chain": "--library {root} --model {root}/model --budgets 2,50% --examples 2 --tests 2",
}


@pytest.mark.slow
def test_commands_that_are_written_down_are_there(monkeypatch, capsys):
    """With their options, and every script has its command on some page."""
    helps = {}
    for name in MODULES:
        module, name = importlib.import_module(name), name.removesuffix(".__main__")
        if hasattr(module, "main"):
            monkeypatch.setattr(sys, "argv", [name, "--help"])
            with pytest.raises(SystemExit) as ended:
                module.main()
            assert ended.value.code == 0, name
            helps[name] = capsys.readouterr().out
    assert len(helps) > 20
    for name, words in helps.items():
        assert words.startswith("usage: ") and f"{name} " in words.replace("\n", " "), name
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    names = set()
    for path in [*pages, *FILES, ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        # There is no other way of calling a script.
        others = set(re.findall(r"python (benchmarks/\S+)", text))
        assert others <= {"benchmarks/speed/stock_loop.py"}, path
        for name, rest in re.findall(r"python -m (benchmarks[\w.]+)([^`\n]*)", text):
            names.add(name := name.rstrip("."))
            assert name in helps, f"{path}: {name}"
            for option in re.findall(r"(?<![\w-])--[\w-]+", rest):
                assert option in helps[name], f"{path}: {name} {option}"
    assert {name for name in helps if not name.endswith("stock_loop")} <= names


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A library, and a run of it."""
    root = tmp_path_factory.mktemp("scripts")
    paths = library(root, NAMES)
    for name in NAMES:
        task(paths.tasks, name, n_probe=12)
        rows = [{"prompt": f"Say {i} as {name}", "completion": f"{i}"} for i in range(4)]
        write_jsonl(paths.tasks / name / "train.jsonl", rows)
    options = {key: str(path) for key, path in paths._asdict().items()}
    options |= {"budget": "2", "probe_examples": 2, "test_examples": 2, "baselines": ()}
    run(RunConfig(**options, output=str(root / "run")), quiet=True)
    return paths


@pytest.fixture
def imported(paths, monkeypatch):
    """Import a script, with the tiny model where it would take the embedded one."""

    def module(name):
        script = importlib.import_module(f"benchmarks.{name}")
        for where in (script, common):
            if hasattr(where, "Model"):
                monkeypatch.setattr(where, "Model", lambda _=None: Model(str(paths.model)))
        if hasattr(script, "RunConfig"):
            config = functools.partial(RunConfig, model=str(paths.model))
            monkeypatch.setattr(script, "RunConfig", config)
        return script

    monkeypatch.delenv("D2C_MLX_CACHE", raising=False)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_prints_and_writes(imported, paths, monkeypatch, tmp_path, capsys, name):
    module = imported(name)
    words = SCRIPTS[name].format(root=paths.tasks.parent).split()
    result = tmp_path / "result.json"
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [name, *words, "--output", str(result)])
    module.main()
    assert json.loads(result.read_text()) and capsys.readouterr().out


@pytest.mark.slow
def test_evaluations_are_counted(imported, paths):
    measured = imported("speed.evaluations").measure(paths.tasks.parent, 2, 2, 2)
    assert json.dumps(measured)
    assert {"evaluations_asked", "evaluations_done", "d2c_merges"} <= measured.keys()


@pytest.mark.slow
def test_plans_are_refined_on_prompts_of_other_rows_than_those_that_plan(paths, tmp_path):
    folder = Path(without_rows.write_prompts(paths.adapters.parent, tmp_path / "alone"))
    options = SimpleNamespace(library=paths.adapters.parent, budgets="60", examples=2, tests=2,
                              prompts=True)  # fmt: skip
    config = plans.config_of(options, tmp_path)
    assert config.refine and config.probe_examples == 2
    for name in NAMES:
        rows = [prompt_key(row) for row in load_task(paths.tasks / name).probe]
        other = load_task(Path(config.tasks) / name, prompts=True)
        assert [prompt_key(row) for row in other.extra] == rows[2:]
        asked = load_task(folder / name, prompts=True)
        assert [prompt_key(row) for part in asked.asked.values() for row in part] == rows
        assert all(map(is_prompt, (*asked.probe, *asked.test)))
