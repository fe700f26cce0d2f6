"""Inputs that lie where a command writes are refused through the real command, and untouched."""

import shutil

import pytest
import yaml
from helpers.command import NAMES, refused
from helpers.tiny import peft_adapter

from d2c_mlx.packs.overwrite import RUN_WRITES, mark
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.files import hash_tree


def test_adapters_where_a_run_writes_its_own(cli, lib, monkeypatch):
    """As a user has them: a project with model, adapters and tasks, and --output ."""
    monkeypatch.chdir(lib.adapters.parent)
    argv = cli.argv(model="model", adapters="adapters", tasks="tasks", output=".")
    (line,) = refused(cli, argv)
    assert "this command writes adapters anew, which would replace your adapters;" in line
    assert "give another --output" in line
    one_by_one = ",".join(f"adapters/{name}" for name in NAMES)
    (line,) = refused(cli, cli.argv(adapters=one_by_one, output="."))
    assert "would replace the adapters adapters/alpha;" in line


@pytest.mark.parametrize("below", ["adapters", "merged", "refined", "refining", "pack"])
@pytest.mark.parametrize("what", ["tasks", "model"])
def test_tasks_and_model_where_a_run_writes(cli, lib, below, what):
    shutil.copytree(lib.adapters, cli.root / "elsewhere")
    shutil.rmtree(lib.adapters)
    there = cli.root / "in" / below / "mine" / what
    there.parent.mkdir(parents=True)
    getattr(lib, what).rename(there)
    options = {"adapters": cli.root / "elsewhere", "output": cli.root / "in", what: there}
    (line,) = refused(cli, cli.argv(**options))
    assert f"writes {cli.root / 'in' / below} anew" in line
    assert f"would replace the {what} {there};" in line


def test_files_that_a_run_writes(cli, lib):
    """A task's rows behind a link."""
    cli.output.mkdir(parents=True)
    rows = lib.tasks / "beta" / "test.jsonl"
    rows.rename(cli.output / "losses.json")
    rows.symlink_to(cli.output / "losses.json")
    (line,) = refused(cli, cli.argv())
    assert f"writes {cli.output / 'losses.json'} anew" in line and str(rows) in line


def test_links_are_followed(cli, lib):
    """Either way: the run's folder leads to the inputs, or the inputs to the run's folder."""
    cli.output.mkdir(parents=True)
    (cli.output / "adapters").symlink_to(lib.adapters)
    (line,) = refused(cli, cli.argv())
    assert str(cli.output / "adapters") in line and str(lib.adapters) in line
    (cli.output / "adapters").unlink()
    lib.adapters.rename(cli.output / "adapters")
    lib.adapters.symlink_to(cli.output / "adapters")
    (line,) = refused(cli, cli.argv())
    assert str(cli.output / "adapters") in line and str(lib.adapters) in line


def test_an_output_among_the_adapters(cli, lib):
    for output in (lib.adapters, lib.adapters / "merged", lib.adapters / "runs" / "first"):
        (line,) = refused(cli, cli.argv(output=output))
        assert f"output: {output} is in the adapters' folder {lib.adapters}" in line
    # One that is named itself is no folder of them.
    alone = lib.adapters / "alpha"
    argv = cli.argv(until="pack", adapters=alone, output=lib.adapters / "merged")
    assert cli(argv)[0] == 0


def test_a_config_of_the_user(cli, lib, monkeypatch):
    monkeypatch.chdir(cli.root)
    values = {"model": str(lib.model), "adapters": str(lib.adapters), "tasks": str(lib.tasks)}
    (cli.root / "config.yaml").write_text(yaml.safe_dump({**values, "output": ".", "budget": 1}))
    for argv in (["run", "config.yaml"], ["run", "--output", "."], cli.argv(output=".")):
        (line,) = refused(cli, argv)
        assert "would replace your config.yaml, which no earlier run wrote; give another" in line
    # So is one with every option: a copy of that of another run, perhaps edited.
    written = RunConfig(**{**values, "output": ".", "budget": "1"}).to_dict()
    (cli.root / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    (line,) = refused(cli, ["run", "config.yaml"])
    assert "would replace your config.yaml, which no earlier run wrote; give another" in line
    # A run that was killed in its first stage wrote one too, beside its marker, and goes on.
    mark(cli.root, "run", dict.fromkeys(RUN_WRITES))
    assert cli(["run", "config.yaml", "--until", "probe"])[0] == 0
    assert cli(["run", "--until", "probe", "--output", "."])[0] == 0


@pytest.mark.slow
def test_what_a_run_writes_is_known(lib, tmp_path):
    options = {"model": str(lib.model), "adapters": str(lib.adapters), "tasks": str(lib.tasks)}
    options |= {
        "output": str(tmp_path / "run"),
        "baselines": (),
    }
    run(RunConfig(**options, budget="60%"), quiet=True)
    output = run(RunConfig(**options, budget="1", refine=True), quiet=True).output
    others = {"refining", "answered", "weights.json"}
    assert {path.name for path in output.iterdir()} | others == set(RUN_WRITES)


def test_convert_replaces_no_input(cli, lib):
    def convert(output, **options):
        return cli.argv("convert", tasks=None, budget=None, output=output, **options)

    for model in (lib.model, lib.model.parent / "link"):
        if model != lib.model:
            model.symlink_to(lib.model)
        lines = refused(cli, convert(lib.model.parent, model=model))
        assert len(lines) == 2
        assert f"writes {lib.model.parent} anew" in lines[0]
        assert f"would replace the model {model};" in lines[0]
        assert f"would replace the adapters {lib.adapters};" in lines[1]
    (line,) = refused(cli, convert(lib.adapters / "mlx"))
    assert "is in the adapters' folder" in line
    peft_adapter(cli.root, "alone")
    assert cli(convert(cli.root / "mlx", adapters=cli.root / "alone"))[0] == 0


def test_models_and_adapters_of_the_user_are_not_replaced(cli, lib):
    """Of the same formats as what is written, in a folder that no command made."""
    assert cli(cli.argv(until="pack"))[0] == 0
    pack = str(cli.output / "pack")
    models, loras = cli.root / "models", cli.root / "loras"
    (models / "org").mkdir(parents=True)
    for name in ("base.gguf", "cluster-0.gguf", "org/other.gguf"):
        (models / name).write_bytes(b"days of work")
    shutil.copytree(lib.adapters / "beta", loras / "mine")
    commands = [["export", pack, "--to", to] for to in ("gguf", "peft", "mlx")]
    commands += [["push", pack, "org/name", "--base", "org/base"]]
    commands.append(["convert", "--model", str(lib.model), "--adapters", str(lib.adapters)])
    for folder in (models, loras):
        before = hash_tree(folder)
        for command in commands:
            (line,) = refused(cli, [*command, "--output", str(folder)])
            assert "is replaced as a whole, and" in line
        assert hash_tree(folder) == before
    # Nor a model beside what an export wrote, which is replaced without it.
    export, out = [*commands[1], "--output", str(cli.root / "out")], cli.root / "out"
    for name in ("cluster-0.gguf", "base.gguf"):
        assert cli(export)[0] == 0
        (out / name).write_bytes(b"of llama.cpp")
        (line,) = refused(cli, export)
        assert f"and {out / name} in it" in line
        (out / name).unlink()


def test_export_replaces_neither_model_nor_pack(cli, lib):
    assert cli(cli.argv(until="pack"))[0] == 0
    pack, model = cli.output / "pack", lib.model.parent
    for to in ("mlx", "peft", "gguf"):
        options = {"to": to, "adapters": None, "tasks": None, "budget": None}
        (line,) = refused(cli, cli.argv("export", pack, **options, output=model))
        assert f"writes {model} anew, which would replace the model {lib.model};" in line
        (line,) = refused(cli, cli.argv("export", pack, **options, output=cli.output))
        assert f"writes {cli.output} anew, which would replace the pack {pack};" in line
    (line,) = refused(cli, ["export", str(pack), "--to", "mlx", "--output", str(pack)])
    assert "would replace your pack;" in line


def test_an_output_is_replaced_only_if_it_is_ours(cli, lib, monkeypatch):
    """Not the directory that the user is in, no file, and nothing that no command wrote."""
    assert cli(cli.argv(until="pack"))[0] == 0
    pack, out = str(cli.output / "pack"), cli.root / "out"
    push = ["push", pack, "org/name", "--base", "org/base"]
    unpack = ["export", pack, "--to", "mlx"]
    commands = [push, unpack, *(["export", pack, "--to", to] for to in ("mlx", "peft"))]
    commands.append(["convert", "--model", str(lib.model), "--adapters", str(lib.adapters)])
    # Each replaces what it wrote before, and nothing of another.
    for command in (push, commands[-1], unpack):
        for _ in range(2):
            assert cli([*command, "--output", str(out)])[0] == 0
        for other in commands:
            if other[0] != command[0]:
                (line,) = refused(cli, [*other, "--output", str(out)])
                assert "in it is of no earlier output of this kind" in line
        shutil.rmtree(out)
    assert cli([*unpack, "--output", str(out)])[0] == 0
    (out / ".DS_Store").write_bytes(b"of a Mac")
    (out / "cluster-0" / "._adapters.safetensors").write_bytes(b"of a Mac on another's drive")
    assert cli([*unpack, "--output", str(out)])[0] == 0
    here = cli.root / "here"
    for folder in (here / "empty", here / "full" / "deep"):
        folder.mkdir(parents=True)
    mine = here / "full" / "deep" / "thesis.txt"
    mine.write_text("mine")
    (here / "file").write_text("mine")
    for command in commands:
        monkeypatch.chdir(here / "empty")
        for output in (".", "..", str(here / "empty")):
            (line,) = refused(cli, [*command, "--output", output])
            assert f"output: {output} is replaced as a whole, and you are in it" in line
        (line,) = refused(cli, [*command, "--output", "../full"])
        assert "and ../full/deep/thesis.txt in it is of no earlier output of this kind" in line
        (line,) = refused(cli, [*command, "--output", "../file"])
        assert "../file is a file, expected a directory or a new name" in line
    assert list((here / "empty").iterdir()) == []
