"""A tiny library, the real command on it, and what must hold when it refuses."""

import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from safetensors.numpy import load_file, save_file

from d2c_mlx import InputError
from helpers.tiny import edit_json

NAMES = ("alpha", "beta", "gamma")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def typed(*words):
    """Standard output of a command that must succeed; the fixture `command` is for one test."""
    done = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def problems_of(call, *args, **options):
    """The lines of the error of bad input that a call raises."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    assert caught.value.exit_code == 2
    return caught.value.problems


class Command:
    """The command line on one library; options are replaced by name, None leaves one out."""

    def __init__(self, lib, root, call):
        self.lib, self.root, self.call = lib, root, call
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

    def __call__(self, argv):
        return self.call(*argv)

    def fails(self, *arguments, **options):
        """The error lines of a `run` that must be refused."""
        lines = self.refused(self.argv("run", *arguments, **options))
        assert lines and not self.output.exists()
        return [line.removeprefix("error: ") for line in lines]

    def contents(self):
        """Of the user's files; the cache is tidied up when Python drops its connection."""
        files = [path for path in self.root.rglob("*") if path.is_file() and path.name != ".lock"]
        return {
            path: path.read_bytes() for path in files if self.root / "cache" not in path.parents
        }

    def refused(self, argv):
        """The error lines of a command that must change no byte."""
        before = self.contents()
        code, out, err = self(argv)
        assert (code, out) == (2, ""), err
        assert self.contents() == before
        assert all(line.startswith("error: ") for line in err.splitlines()), err
        return err.splitlines()


def edit_tensors(directory, change, name="adapter_model.safetensors"):
    """Rewrite an adapter's tensors after `change` worked on the dictionary of them."""
    path = directory / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def edit_config(directory, **changes):
    return edit_json(directory / "adapter_config.json", **changes)
