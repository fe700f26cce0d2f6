"""A tiny library, the real command on it, and what must hold when it refuses."""

import json

from safetensors.numpy import load_file, save_file

NAMES = ("alpha", "beta", "gamma")
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


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
        lines = refused(self, self.argv("run", *arguments, **options))
        assert lines and not self.output.exists()
        return [line.removeprefix("error: ") for line in lines]

    def fails_with(self, *parts, **options):
        """The only error line; it must hold every one of `parts`."""
        (line,) = self.fails(**options)
        assert all(str(part) in line for part in parts)
        return line


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


def contents(root):
    """Of the user's files; the cache of losses is tidied up when Python drops its connection."""
    files = [p for p in root.rglob("*") if p.is_file() and root / "cache" not in p.parents]
    return {p: p.read_bytes() for p in files if p.name != ".lock"}


def refused(cli, argv):
    """The error lines of a command that must change no byte."""
    before = contents(cli.root)
    code, out, err = cli(argv)
    assert (code, out) == (2, ""), err
    assert contents(cli.root) == before
    assert all(line.startswith("error: ") for line in err.splitlines()), err
    return err.splitlines()
