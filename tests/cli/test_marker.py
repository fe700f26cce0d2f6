"""Markers: they list what a command wrote, and nothing that they do not list is replaced."""

import json
import os
import shutil

import pytest
from helpers.command import refused
from helpers.tiny import peft_adapter

from d2c_mlx.packs.overwrite import MARKER, RUN_WRITES, listed, mark
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.errors import InputWarning
from d2c_mlx.utils.files import hash_file, hash_tree

pytestmark = pytest.mark.slow


@pytest.fixture
def pack(cli):
    """A pack, made by a run."""
    assert cli(cli.argv(until="pack", budget="2"))[0] == 0
    return cli.output / "pack"


@pytest.fixture
def commands(lib, pack):
    """All that write a directory, but for a run; without --output."""
    convert = ["convert", "--model", str(lib.model), "--adapters", str(lib.adapters)]
    return {
        "export": ["export", str(pack), "--to", "peft"],
        "push": ["push", str(pack), "org/name", "--base", "org/base"],
        "convert": convert,
    }


def made(cli, command, name="out"):
    output = cli.root / name
    code, _, err = cli([*command, "--output", str(output)])
    assert code == 0, err
    return output


@pytest.mark.parametrize("name", ["export", "push", "convert"])
def test_every_output_lists_its_files_and_nothing_of_this_machine(cli, commands, name):
    output = made(cli, commands[name], name)
    files = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    del files[MARKER]
    assert listed(output, name) == {path: hash_file(file) for path, file in files.items()}
    assert str(cli.root) not in (output / MARKER).read_text()


def test_a_run_marks_its_directory_and_its_folders(cli, pack):
    assert set(listed(cli.output, "run")) == set(RUN_WRITES)
    for folder in ("adapters", "merged"):
        assert set(listed(cli.output / folder, "run")) == {
            path.relative_to(cli.output / folder).as_posix()
            for path in (cli.output / folder).rglob("adapter*") if path.is_file()
        }  # fmt: skip
    # A pack is known by its manifest.
    assert not (pack / MARKER).exists()


@pytest.mark.parametrize("name", ["export", "push", "convert"])
@pytest.mark.parametrize("change", ["added", "changed", "linked"])
def test_what_is_not_as_it_was_written_is_not_replaced(cli, commands, name, change):
    output = made(cli, commands[name])
    adapter = output / ("alpha" if name == "convert" else "cluster-0")
    mine = adapter / ("adapter_config.json" if change == "changed" else "mine")
    if change == "linked":
        mine.symlink_to(cli.root / "in")
    else:
        mine.write_text("{}")
    (line,) = refused(cli, [*commands[name], "--output", str(output)])
    assert line.endswith(
        f"{output} is replaced as a whole, and {mine} in it is of no earlier output of this kind;"
        " name another directory, or empty this one"
    )


def lying(directory, **changes):
    """A marker in a directory of the user's."""
    said = {"format": "d2c-mlx-output", "format_version": 1, "version": "0", "kind": "export",
            "files": {}}  # fmt: skip
    (directory / MARKER).write_text(json.dumps({**said, **changes}))


@pytest.mark.parametrize("kind", ["export", "push", "convert", "run", "all", None])
def test_a_marker_alone_lets_nothing_be_deleted(cli, commands, kind):
    mine = cli.root / "mine"
    file = peft_adapter(mine, "alpha") / "adapter_config.json"
    listings = [
        {},
        [str(file.relative_to(mine))],
        {str(file): hash_file(file)},
        {"alpha": None, "*": None, ".": None, "../mine/alpha/adapter_config.json": None},
        {"alpha/adapter_config.json": None, "alpha/adapter_model.safetensors": None},
        {"alpha/adapter_config.json": "0" * 64, "alpha/adapter_model.safetensors": "0" * 64},
        {"alpha/adapter_config.json": hash_file(file)},
    ]
    for files in listings:
        lying(mine, kind=kind, files=files)
        for command in commands.values():
            (line,) = refused(cli, [*command, "--output", str(mine)])
            assert f"{mine} is replaced as a whole, and {mine}/" in line


def test_a_marker_of_a_run_alone_lets_nothing_be_deleted(cli, lib):
    mine = cli.root / "mine"
    peft_adapter(mine / "adapters", "alpha")
    (mine / "report.md").write_text("mine")
    known = dict.fromkeys(RUN_WRITES)
    for kind, files, names in (
        ("run", {}, ["adapters", MARKER, "report.md"]),
        ("export", known, ["adapters", MARKER, "report.md"]),
        ("run", {MARKER: None, "report.md": None}, ["adapters"]),
        ("run", {MARKER: None, "adapters": None}, ["adapters/alpha", "report.md"]),
        ("run", known, ["adapters/alpha"]),
    ):
        lying(mine, kind=kind, files=files)
        (line,) = refused(cli, cli.argv(output=mine))
        assert f"your {', '.join(str(mine / name) for name in names)}, which no" in line
    # Nor one of another kind inside, nor one that lists other files.
    for kind, files in (("export", ["alpha/adapter_config.json"]), ("run", ["alpha", "beta/x"])):
        lying(mine / "adapters", kind=kind, files=dict.fromkeys(files))
        (line,) = refused(cli, cli.argv(output=mine))
        assert f"{mine / 'adapters' / 'alpha'}, which no earlier run wrote" in line


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, {"format": "zip"}, {"format_version": 2},
     {"format_version": "1"}, {"files": ["tasks.json"]}, {"files": {"x": 3}}, {"kind": []}],
)  # fmt: skip
def test_a_file_of_that_name_that_is_none_of_ours(cli, commands, content):
    """It is a file of the user's like any other, for a run too."""
    output = made(cli, commands["export"])
    if isinstance(content, dict):
        lying(output, **{"files": dict(listed(output, "export")), **content})
    else:
        (output / MARKER).write_bytes(content)
    (line,) = refused(cli, [*commands["export"], "--output", str(output)])
    assert f"and {output}/" in line and "in it is of no earlier output" in line
    (line,) = refused(cli, cli.argv(output=output))
    assert f"your {output / MARKER}, which no earlier run wrote" in line


def test_a_marker_that_is_no_file(tmp_path):
    (tmp_path / "folder" / MARKER).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / MARKER)
    for name in ("folder", "pipe", "nowhere"):
        assert listed(tmp_path / name, "run") == {}


def test_outputs_without_a_marker(cli, commands, lib, pack):
    """They are refused with what to do, or replaced when they are empty."""
    for name, command in commands.items():
        output = made(cli, command, name)
        (output / MARKER).unlink()
        (line,) = refused(cli, [*command, "--output", str(output)])
        assert line.endswith("name another directory, or empty this one")
        shutil.rmtree(output)
        (output / "empty").mkdir(parents=True)
        made(cli, command, name)


def test_a_run_that_was_killed_early_goes_on(cli, lib):
    """Its marker is the first that it writes."""
    cli.output.mkdir(parents=True)
    mark(cli.output, "run", dict.fromkeys(RUN_WRITES))
    (cli.output / "config.yaml").write_text("half a con")
    (cli.output / "losses.json").write_text("{}")
    assert cli(cli.argv(until="probe"))[0] == 0
    # In the middle of a later stage: adapters are written, and no record of it.
    shutil.rmtree(cli.output / ".stages")
    assert cli(cli.argv(until="probe"))[0] == 0


def test_a_run_keeps_what_was_put_among_its_refinements(cli, lib):
    cli.output.mkdir(parents=True)
    mark(cli.output, "run", dict.fromkeys(RUN_WRITES))
    part = cli.output / "refining" / "0123"
    part.mkdir(parents=True)
    (part / "refine.json").write_text("{}")
    mark(part, "run")
    argv = [*cli.argv(until="refine", budget="2"), "--refine"]
    (part / "notes.txt").write_text("mine")
    (line,) = refused(cli, argv)
    assert f"your {part}, which no earlier run wrote" in line
    (part / "notes.txt").rename(cli.output / "refining" / "notes.txt")
    (line,) = refused(cli, argv)
    assert f"your {cli.output / 'refining' / 'notes.txt'}, which" in line
    (cli.output / "refining" / "notes.txt").unlink()
    assert cli(argv)[0] == 0


def test_an_adapter_that_was_trained_on_is_not_replaced(cli, lib, pack):
    config = cli.output / "adapters" / "beta" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    (line,) = refused(cli, cli.argv(budget="2"))
    assert f"your {config.parent}, which no earlier run wrote" in line


def test_what_was_put_among_the_planned_adapters_is_not_replaced(cli, lib):
    assert cli(cli.argv(until="plan", budget="60%"))[0] == 0
    mine = cli.output / "planned" / "rows.csv"
    mine.write_text("mine")
    (line,) = refused(cli, cli.argv(until="plan", budget="50%"))
    assert f"your {mine}, which no earlier run wrote" in line
    mine.unlink()
    # A damaged file is made anew.
    (cli.output / "planned" / "compact.safetensors").write_bytes(b"damaged")
    assert cli(cli.argv(until="pack", budget="60%"))[0] == 0


def test_what_was_put_among_the_copied_adapters_is_not_replaced(cli, lib):
    with pytest.warns(InputWarning, match="200% has room for all adapters"):
        assert cli(cli.argv(until="plan", budget="200%"))[0] == 0
    mine = cli.output / "merged" / "rows.csv"
    mine.write_text("mine")
    again = ["run", "--until", "plan", "--output", cli.output]
    for argv in (cli.argv(until="plan", budget="300%"), again):
        (line,) = refused(cli, [*argv, "--seed", "5"])
        assert f"your {mine}, which no earlier run wrote" in line


def test_a_link_in_a_folder_of_a_run_is_kept(cli, lib, pack):
    """It leads to a directory of the user's, and would be gone."""
    link = cli.output / "adapters" / "mine"
    link.symlink_to(lib.adapters / "alpha")
    (line,) = refused(cli, cli.argv(budget="1"))
    assert f"your {link}, which no earlier run wrote" in line
    link.unlink()
    (cli.output / "adapters" / ".hidden").mkdir()
    assert cli(cli.argv(until="probe", budget="1"))[0] == 0


def test_listings_and_hashes_pass_over_markers(cli, commands, lib, pack):
    """A converted folder is one of adapters like any other; a pack keeps its hash."""
    converted = made(cli, commands["convert"], "converted")
    again = cli.argv(until="pack", adapters=converted, output=cli.root / "again", budget="2")
    assert cli(again)[0] == 0
    assert hash_tree(cli.root / "again" / "pack") == hash_tree(pack)
    before = hash_tree(converted)
    (converted / MARKER).unlink()
    assert hash_tree(converted) == before
    # The folders of a run are such folders, too.
    inside = cli.argv(until="pack", adapters=cli.output / "adapters", budget="2")
    inside[inside.index("--output") + 1] = str(cli.root / "third")
    assert cli(inside)[0] == 0


def test_a_folder_to_push_is_a_pack_with_its_marker(cli, commands, pack):
    output = made(cli, commands["push"])
    assert load_pack(output).manifest == load_pack(pack).manifest
    code, out, _ = cli([*commands["push"], "--output", str(output), "--json"])
    assert code == 0 and MARKER not in json.loads(out)["files"]
