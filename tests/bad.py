"""A tiny library, the real command on it, and what must hold when it refuses."""

import json
import shutil
import sys

import pytest
from d2c_mlx_cli.main import main
from safetensors.numpy import load_file, save_file
from tiny import Library, library

NAMES = ("alpha", "beta", "gamma")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    library(root, NAMES)
    return root


@pytest.fixture
def lib(pristine, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(pristine, root)
    return Library(root / "model", root / "adapters", root / "tasks")


class Command:
    """The command line on one library; options are replaced by name, None leaves one out."""

    def __init__(self, lib, root, monkeypatch, capsys):
        self.lib, self.root, self.monkeypatch, self.capsys = lib, root, monkeypatch, capsys
        self.output = root / "runs" / "out"

    def argv(self, command="run", *arguments, **options):
        values = {
            "model": self.lib.model,
            "adapters": self.lib.adapters,
            "tasks": self.lib.tasks,
            "budget": "1",
            "output": self.output,
            **options,
        }
        pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in values.items() if v is not None]
        return [command, *map(str, arguments), *(part for pair in pairs for part in pair)]

    def files(self):
        # The lock of the cache of converted models stays.
        return {p for p in self.root.rglob("*") if p.is_file() and p.name != ".lock"}

    def __call__(self, argv):
        """Exit code, standard output and standard error. Any other exception is a traceback."""
        self.monkeypatch.setattr(sys, "argv", ["d2c-mlx", *argv])
        self.capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *self.capsys.readouterr()

    def fails(self, *arguments, **options):
        """The error lines of a `run` that must be refused."""
        before = self.files()
        code, out, err = self(self.argv("run", "--quiet", *arguments, **options))
        assert code == 2, err
        assert "Traceback" not in err
        assert out == ""
        assert not self.output.exists()
        assert self.files() == before
        lines = err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    def fails_with(self, *parts, **options):
        """The only error line; it must hold every one of `parts`."""
        (line,) = self.fails(**options)
        for part in parts:
            assert str(part) in line
        return line


@pytest.fixture
def cli(lib, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    return Command(lib, tmp_path, monkeypatch, capsys)


def edit_tensors(directory, change):
    """Rewrite an adapter's tensors after `change` worked on the dictionary of them."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path
