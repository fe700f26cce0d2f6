"""Optional packages are asked for before any work; all that is installed is known to the byte."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

from d2c_mlx.utils.environment import EXTRAS

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Modules that are only imported to serve over HTTP.
SERVER = {f"d2c_mlx.{name}" for name in (
    "serve.requests", "serve.scheduler", "serve.service", "serve.text", "web.routes", "web.server",
)}  # fmt: skip


def without_extras(code, *args):
    """Run Python code in a process in which no optional package can be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({[*sum(EXTRAS.values(), ())]!r})); "
    return subprocess.run([sys.executable, "-c", block + code, *map(str, args)],
                          capture_output=True, text=True)  # fmt: skip


def command(*args):
    return without_extras("from d2c_mlx_cli.main import main; main()", *args)


def test_serve_says_what_to_install_before_it_reads_the_pack(tmp_path):
    done = command("serve", tmp_path / "no-pack")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: serve: needs the package starlette, which is not installed;"
        ' run pip install "d2c-mlx[serve]", in a clone ".[serve]"\n'
    )


@pytest.mark.slow
def test_only_the_server_imports_an_extra():
    code = """
import importlib, json, pkgutil
import d2c_mlx
failed = []
for module in pkgutil.walk_packages(d2c_mlx.__path__, "d2c_mlx."):
    try:
        importlib.import_module(module.name)
    except ImportError:
        failed.append(module.name)
print(json.dumps(failed))
"""
    done = without_extras(code)
    assert set(json.loads(done.stdout)) == SERVER, done.stderr


def pinned(path):
    """Name -> versions that a lock file installs, each with a hash."""
    found = {}
    for entry in re.sub(r"\\\n", " ", path.read_text()).splitlines():
        if not entry.strip() or entry.startswith("#"):
            continue
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        assert "--hash=sha256:" in entry, entry
        found.setdefault(name.lower(), []).append(version)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_commit_and_may_do_little(path):
    text = path.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", one) for one in uses)
    assert yaml.safe_load(text)["permissions"] in ({}, {"contents": "read"})


def test_the_locks_have_what_the_project_asks_for_with_hashes():
    assert all(map(pinned, (ROOT / "requirements").glob("*.txt")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, asked in (
        ("demo", project["dependencies"]),
        ("test", [*project["dependencies"], *project["optional-dependencies"]["test"][1:]]),
        ("model", project["optional-dependencies"]["demo"]),
    ):
        found = pinned(ROOT / "requirements" / f"{lock}.txt")
        for one in map(Requirement, asked):
            # torch is left to pip: whoever has a build for the CPU keeps it.
            if one.name != "torch":
                assert all(map(one.specifier.contains, found[one.name.lower()])), one
        assert lock == "model" or {"pip", "setuptools", "setuptools-scm"} <= found.keys()
