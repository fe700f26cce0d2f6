"""What the documents say is run, and every module says what it exports."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import d2c_mlx
from d2c_mlx.config import load_config

ROOT = Path(__file__).parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(d2c_mlx.__path__, "d2c_mlx.")]


def test_readme_example_runs(monkeypatch, tmp_path, capsys):
    """The Python block of the README, on the embedded model; only its output goes elsewhere."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    monkeypatch.chdir(ROOT)
    exec(code.replace("runs/readme", str(tmp_path / "run")), {})
    loss = float(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < loss < 5


def test_demo_config_is_valid():
    config = load_config(ROOT / "examples" / "demo.yaml", {"output": "x"})
    names = {path.name for path in (ROOT / config.adapters).iterdir()}
    assert 6 <= len(names) <= 8
    assert names == {path.name for path in (ROOT / config.tasks).iterdir()}
    size = sum(f.stat().st_size for f in (ROOT / "examples").rglob("*") if f.is_file())
    assert size < 16e6


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    names = module.__all__
    assert len(set(names)) == len(names)
    for public in names:
        assert getattr(module, public).__doc__ is not None or not callable(getattr(module, public))


def test_workflow_and_ci_call_the_readme_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert {"run": ".ci/run"} in steps["jobs"]["test"]["steps"]
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme
