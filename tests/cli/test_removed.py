"""Options, values and commands that are gone: each says what to use instead, and old runs go on."""

import re
import sys

import pytest
import yaml
from d2c_mlx_cli.main import main
from d2c_mlx_cli.removed import COMMANDS, OPTIONS

from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.config_file import load_config
from d2c_mlx.run.removed import REMOVED, REMOVED_VALUES
from d2c_mlx.utils.errors import ConfigError, InputWarning

NEEDED = {"adapters": "loras", "tasks": "tasks", "output": "out"}


@pytest.fixture
def refused(monkeypatch, capsys):
    """The line of a command that must be refused."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["d2c-mlx", *argv])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        (line,) = [one for one in err.splitlines() if not one.startswith("warning: ")]
        return line

    return call


@pytest.mark.parametrize("key", REMOVED)
@pytest.mark.parametrize("command", ["run", "cluster", "bench"])
def test_an_option_of_a_run(refused, command, key):
    for option in (f"--{key}=3", f"--{key}", *(["--no-compile"] if key == "compile" else [])):
        line = refused(command, option)
        assert line == f"error: {option.split('=')[0]}: {REMOVED[key]}"
        assert "no longer an option; " in line


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_of_another_command(refused, command, option):
    if command == "phone":
        command = "bench"
    line = refused(command, "pack", "adapter", option, "x", *["--device=x"] * (command == "bench"))
    assert line == f"error: {option}: no longer an option; {OPTIONS[command, option]}"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command(refused, words):
    line = refused(*words, "a.json", "b.json")
    assert line == f"error: {' '.join(words)}: no longer a command; {COMMANDS[words]}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--xyz"], "No such option '--xyz'; see d2c-mlx run --help"),
        (["rum"], "No such command 'rum'. Did you mean 'run'? See d2c-mlx --help"),
        (["add"], "Missing argument 'PACK'; see d2c-mlx add --help"),
        (["run", "--seed=a"],
         "Invalid value for '--seed': 'a' is not a valid integer; see d2c-mlx run --help"),
        (["tasks", "split", "--odd"], "No such option '--odd'; see d2c-mlx tasks split --help"),
    ],
)  # fmt: skip
def test_what_never_was(refused, words, said):
    assert refused(*words) == f"error: {said}"


@pytest.mark.parametrize("key", REMOVED)
def test_a_key_of_a_file(tmp_path, key):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, key: REMOVED[key].default, "seed": -1}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert caught.value.problems == [
        f"{path}: {key}: {REMOVED[key]}",
        f"{path}: seed: found -1, expected 0 to 4,294,967,295",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REMOVED_VALUES.items() for value in values]
)
def test_a_value(key, value):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**NEEDED, **{key: value})
    assert caught.value.problems == [f"{key}: {REMOVED_VALUES[key][value]}"]


def test_a_run_of_before_goes_on(tmp_path):
    """Its config has every option of its day; what was asked for and is gone is told."""
    path = tmp_path / "config.yaml"
    old = {**NEEDED, "budget": "2", "plan": "d2c", "patience": None}
    old |= {key: gone.default for key, gone in REMOVED.items()}
    path.write_text(yaml.safe_dump(old))
    assert load_config(path, {}, saved=True) == RunConfig(**NEEDED, budget="2")
    path.write_text(yaml.safe_dump(old | {"restarts": 4, "init": ["kmeans"], "search": "moves"}))
    with pytest.warns(InputWarning) as warned:
        assert load_config(path, {}, saved=True) == RunConfig(**NEEDED, budget="2")
    assert sorted(re.split(" (?:of|is)", str(one.message))[0] for one in warned) == [
        "init: ['kmeans']", "restarts: 4", "search: moves",
    ]  # fmt: skip
