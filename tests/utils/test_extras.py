"""Optional packages: what needs one says so before any work, and nothing else needs one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.phone import make_pack
from helpers.tiny import library

from d2c_mlx.utils.environment import EXTRAS, require_extra

ROOT = Path(__file__).parents[2]
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


def missing(user, module, extra):
    return (
        f"error: {user}: needs the package {module}, which is not installed;"
        f' run pip install "d2c-mlx[{extra}]", in a clone ".[{extra}]"'
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("extras"), ["a", "b", "c"])


def test_each_extra_is_in_pyproject_and_in_what_the_tests_install():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, modules in EXTRAS.items():
        (line,) = re.findall(rf"\n{extra} = (\[.*?\])", text, re.DOTALL)
        packages = [re.split(">=", one)[0] for one in json.loads(line)]
        assert packages == [module.replace("_", "-") for module in modules]
        require_extra(extra, "test")
    assert f'"d2c-mlx[{",".join(sorted(EXTRAS))}]"' in text


def test_serve_says_what_to_install_before_it_reads_the_pack(tmp_path):
    done = command("serve", tmp_path / "no-pack")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == missing("serve", "starlette", "serve") + "\n"


@pytest.mark.slow
def test_runs_and_a_phone_need_no_extra(paths, tmp_path):
    output = tmp_path / "run"
    done = command("run", "--model", paths.model, "--adapters", paths.adapters, "--tasks",
                   paths.tasks, "--budget", "1", "--output", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (output / "report.html").is_file()
    assert command("verify", output / "pack").returncode == 0

    pack = make_pack(paths, tmp_path / "pack")
    phone = ["phone", pack.path, "--model", paths.model, "--device", "mac-8gb", "--contexts", "4",
             "--decode", "2", "--runs", "1", "--tasks", paths.tasks, "--test-examples", "1",
             "--json"]  # fmt: skip
    done = command(*phone)
    assert done.returncode == 0, done.stderr
    assert "metrics" in json.loads(done.stdout)["quality"]["device"]["pack"]


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
