"""The examples run as they stand, on a tiny library in the place of the demo's."""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.adapters import small_pack
from helpers.tiny import library, task

import d2c_mlx

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def start(name, *args):
    argv = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True)


@pytest.fixture
def demo(tmp_path):
    """Two of the demo's adapters, with rows as the demo has them."""
    paths = library(tmp_path / "examples" / "demo", ["date-en", "num-en"])
    for name in ("date-en", "num-en"):
        rows = [[{"role": "user", "content": f"Question {i}"},
                 {"role": "assistant", "content": f"Answer {i}"}] for i in range(8)]  # fmt: skip
        task(paths.tasks, name, rows=[{"messages": row} for row in rows])
    return paths


def test_two_adapters_become_a_pack_that_mlx_lm_generates_with(demo, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "two_adapters.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = functools.partial(d2c_mlx.RunConfig, model=str(demo.model))
    monkeypatch.setattr(example, "RunConfig", config)
    monkeypatch.setattr(example, "DEMO", demo.model.parent)
    example.main(tmp_path / "two")
    lines = capsys.readouterr().out.splitlines()
    assert "; loss " in lines[0] and len(lines) == 7
    pack = d2c_mlx.load_pack(tmp_path / "two" / "run")
    assert sorted(pack.tasks) == ["date-en", "num-en"] and len(pack.adapters) == 1


def test_a_new_task_is_composed_added_and_answered(tmp_path):
    paths = library(tmp_path, ["a", "b", "c"])
    done = start("new_task.py", tmp_path / "out", tmp_path, "c", paths.model)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("as good: ") and lines[-2].startswith("  answered ")
    tasks = json.loads((tmp_path / "out" / "run" / "pack" / "manifest.json").read_text())["tasks"]
    assert len({tasks[name] for name in "abc"}) == 3


def test_the_notebook_runs_from_top_to_bottom(demo, tmp_path, monkeypatch, capsys):
    """Its cells in their order in one namespace, as a kernel runs them."""
    notebook = json.loads((EXAMPLES / "compare.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    model = f'options = {{\n    "model": {str(demo.model)!r},'
    assert "options = {" in code
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("OUTPUT", str(tmp_path / "runs"))
    exec(code.replace("options = {", model), {})
    printed = capsys.readouterr().out
    # The outputs in the notebook file are those of this run, except for the numbers.
    shown = "".join(text for cell in cells for out in cell["outputs"] for text in out["text"])
    words = [[line.split("|")[1:3] for line in sorted(text.splitlines()) if "|" in line]
             for text in (shown, printed)]  # fmt: skip
    assert words[0] == words[1] and len(words[0]) == 4
    assert "tsv less linear: " in printed


def test_a_model_of_the_hub_is_benched(tmp_path):
    """What the example does once the hub has given the model."""
    paths = library(tmp_path, ["a", "b", "c"])
    pack = small_pack(paths, tmp_path / "pack").path
    done = start("bench_hub_model.py", pack, paths.model)
    assert done.returncode == 0, done.stderr
    assert "# 3 tasks on model (4 bit), as on iphone-6gb" in done.stdout
