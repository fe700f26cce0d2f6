"""`d2c-mlx init`: what a first run needs."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import library, peft_adapter

from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.run.config import load_config
from d2c_mlx.run.survey import survey
from d2c_mlx.utils.templates import size


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Three adapters; rows of one of them are missing, of another half."""
    library(tmp_path, ["a", "b", "c"])
    (tmp_path / "tasks" / "b" / "test.jsonl").unlink()
    for file in (tmp_path / "tasks" / "c").iterdir():
        file.unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_found_and_missing_is_said_and_written(project, command):
    peft_adapter(project / "adapters", "a", rank=2)
    for name in "bc":  # never the embedded default in the place of what they name
        peft_adapter(project / "adapters", name, base_model_name_or_path="moved/llama")
    kept = (project / "tasks" / "b" / "probe.jsonl").read_bytes()
    code, out, err = command("init", "adapters")
    assert (code, err) == (0, "")
    for words in ("3 adapters in adapters", "moved/llama, tiny/llama", "ranks        2, 4",
                  "missing for b, c (2 of 3)", "3 empty files of rows in tasks"):  # fmt: skip
        assert words in out
    assert (project / "tasks" / "b" / "probe.jsonl").read_bytes() == kept
    config = load_config(project / "d2c-mlx.yaml", {})
    assert (config.adapters, config.tasks, config.model) == ("adapters", "tasks", "moved/llama")
    # What is empty is refused with an example, and the note is no task.
    code, _, err = command("run", "d2c-mlx.yaml", "--model", "model")
    assert code == 2 and len(err.splitlines()) == 4 and "budget: 12.5% is" in err
    assert err.count('empty; expected a JSON object per line, such as {"prompt') == 3


def test_nothing_that_is_there_is_replaced_and_bytes_are_those_of_a_run(project, command):
    """Without the base model, to a few bytes of config."""
    (project / "d2c-mlx.yaml").write_text("mine")
    code, out, _ = command("init", "adapters", "--json")
    about = json.loads(out)
    assert code == 0 and "d2c-mlx.yaml" not in about["written"]
    assert (project / "d2c-mlx.yaml").read_text() == "mine"
    assert json.loads(command("init", "adapters", "--json")[1])["written"] == []
    sizes = {adapter["name"]: adapter["nbytes"] for adapter in about["adapters"]}
    assert about["budgets"]["50%"] == sum(sizes.values()) // 2
    assert about["budgets"]["1"] == max(sizes.values())
    options = ["--adapters=adapters", "--model=model", "--output=m"]
    assert command("convert", *options)[0] == 0
    for name, nbytes in sizes.items():
        assert nbytes == sum(file.stat().st_size for file in Path("m", name).iterdir())


def test_where_rows_are_looked_for(project, command, monkeypatch):
    """Beside the folder, whatever theirs is called; new ones never among the adapters."""
    for listed in ("adapters", "adapters/a,adapters/b", "adapters/a"):
        assert survey(listed).tasks == Path("tasks")
    rows = (project / "tasks" / "a" / "probe.jsonl").read_bytes()
    for name in "abc":
        (project / "data" / name).mkdir(parents=True)
        for file in ("train", "valid", "test"):
            (project / "data" / name / f"{file}.jsonl").write_bytes(rows)
    code, out, err = command("init", "adapters")
    assert (code, out) == (2, "") and "found rows in data and tasks" in err
    shutil.rmtree("tasks")
    code, out, _ = command("init", "adapters")
    assert code == 0 and "rows         in data: 4 calibration and 4 held-out rows each" in out
    assert "missing" not in out and load_config(project / "d2c-mlx.yaml", {}).tasks == "data"
    monkeypatch.chdir("adapters")
    assert survey(".").tasks == Path("../data")
    shutil.rmtree("../data")
    before = sorted(project.rglob("*"))
    code, out, err = command("init", ".")
    assert (code, out) == (2, "") and "tasks: new rows would lie among the adapters" in err
    assert sorted(project.rglob("*")) == before
    monkeypatch.chdir(project)
    assert command("init", "adapters", "--output", "new/x.yaml")[0] == 0
    assert Path("new/tasks/c/test.jsonl").is_file() and not Path("tasks").exists()


def test_gguf_and_pickles_are_what_a_run_takes_them_for(project, command):
    base = Model("model")
    for name, file in (("a", "x.gguf"), ("b", "X.GGUF"), ("c", "adapter_model.bin")):
        path = project / "adapters" / name
        adapter = read_adapter(path, base.module_shapes, base.config)
        (path / "adapter_model.safetensors").rename(path / file)
        if name != "c":
            (path / "adapter_config.json").unlink()
            save_gguf(adapter, path / file, base.config)
    n = sum(path.stat().st_size for path in (project / "adapters").rglob("*.[gG]*"))
    code, out, _ = command("init", "adapters")
    assert code == 0 and f"3 adapters in adapters, {size(n)}" in out
    assert "problem      adapters/c/adapter_model.bin: a pickle can run code" in out
    assert out.count("problem") == 1
    for path in (project / "adapters").rglob("*.[gG]*"):
        path.unlink()
    code, out, err = command("init", "adapters", "--output", "x.yaml")
    assert (code, out) == (2, "") and err and not Path("x.yaml").exists()
