"""A directory is replaced only if it holds no input and nothing that no command of ours wrote."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers.adapters import adapter_of
from helpers.command import problems_of
from helpers.runs import config_of
from helpers.tiny import peft_adapter

from d2c_mlx.adapters.reading import find_adapters
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.overwrite import MARKER, RUN_WRITES, check_output, check_run, listed, mark
from d2c_mlx.packs.write import write_pack
from d2c_mlx.pipeline import run
from d2c_mlx.utils.files import hash_file, hash_tree

CONFIG, KIND = "adapter_config.json", "export"


def write(path, content="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def output_of(root):
    for name in ("a/adapter_config.json", "a/adapters.safetensors", "tasks.json"):
        write(root / name, "{}")
    mark(root, KIND)
    return root


def lie(root, **changes):
    content = {"format": "d2c-mlx-output", "format_version": 1, "kind": "export", "files": {}}
    write(root / MARKER, json.dumps({**content, **changes}))


@pytest.fixture
def inputs(tmp_path):
    root = tmp_path / "in"
    write(root / "model" / "config.json", "{}")
    for name in ("alpha", "beta"):
        peft_adapter(root / "adapters", name)
        write(root / "tasks" / name / "test.jsonl")
    return root


def run_directory(out):
    """A run's directory: it has a marker, and so has each of its folders."""
    mark(out, "run", dict.fromkeys(RUN_WRITES))
    for name in ("adapters", "merged", "planned", "refining/0123"):
        write(out / name / "0" / CONFIG, "{}")
        mark(out / name, "run")
    return out


def checked(output, inputs, **changes):
    paths = {name: str(inputs / name) for name in ("adapters", "tasks", "model")}
    paths |= {name: str(path) for name, path in changes.items()}
    check_run(output, find_adapters(paths["adapters"]), paths["tasks"], paths["model"])


# What is done to an output, and the file that is not ours then; None: it may be replaced.
CHANGES = {
    "nothing": (lambda out: None, None),
    "emptied": (lambda out: shutil.rmtree(out) or (out / "empty").mkdir(parents=True), None),
    "of a Mac": (lambda out: [write(out / n) for n in (".DS_Store", "a/._adapters.safetensors")],
                 None),
    "added": (lambda out: write(out / "a" / "mine"), "a/mine"),
    "changed": (lambda out: write(out / "a" / CONFIG), f"a/{CONFIG}"),
    "linked": (lambda out: (out / "a" / "mine").symlink_to(out.parent), "a/mine"),
    "no marker": (lambda out: (out / MARKER).unlink(), "tasks.json"),
}  # fmt: skip
# A change of a run's directory, and the file that is the user's after it; None: the run goes on.
RUNS = {
    "nothing": (lambda out: None, None),
    "killed in its first stage": (lambda out: write(out / "config.yaml", "half a con"), None),
    "damaged": (lambda out: write(out / "merged" / "0" / CONFIG, "{"), None),
    "files beside": (lambda out: [write(out / n) for n in ("notes", ".git/x", "data/pack")], None),
    "notes": (lambda out: write(out / "merged" / "0" / "notes"), "merged/0/notes"),
    "trained on": (lambda out: write(out / "adapters" / "0" / CONFIG, '{"x": 1}'),
                   f"adapters/0/{CONFIG}"),
    "a link": (lambda out: (out / "adapters" / "mine").symlink_to(out.parent), "adapters/mine"),
    "in a refinement": (lambda out: write(out / "refining" / "0123" / "x"), "refining/0123/x"),
    "no marker": (lambda out: (out / MARKER).unlink(), "adapters"),
    "another marker": (lambda out: lie(out, files=dict.fromkeys(RUN_WRITES)), MARKER),
    "listed less": (lambda out: lie(out, kind="run", files={MARKER: None}), "adapters"),
    "a marker inside": (lambda out: lie(out / "merged", files={f"0/{CONFIG}": None}),
                        f"merged/0/{CONFIG}"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "changes"), [(output_of, CHANGES), (run_directory, RUNS)])
def test_only_what_was_written_is_replaced(inputs, tmp_path, make, changes):
    for i, (change, foreign) in enumerate(changes.values()):
        out = make(tmp_path / str(i))
        check = (
            partial(checked, out, inputs) if changes is RUNS else partial(check_output, out, KIND)
        )
        change(out)
        before = hash_tree(out)
        if foreign is None:
            check()
        else:
            (line,) = problems_of(check)
            assert str(out / foreign) in line
        assert hash_tree(out) == before


# Markers, and the file that is not ours by them.
MARKERS = [
    *((text, MARKER) for text in ("", "{", "[]", "[" * 9999)),
    *((change, MARKER) for change in ({"format": "zip"}, {"format_version": 2}, {"kind": []},
                                      {"kind": "run"}, {"files": ["tasks.json"]}, {"files": {}})),
    *(({"files": files}, "tasks.json") for files in (
        {"a": None, "*": None, ".": None}, {"../out/tasks.json": None},
        {"tasks.json": "0" * 64}, {"tasks.json": None}, {"tasks.json": 3})),
]  # fmt: skip


def test_a_marker_that_lies_or_is_no_file_is_not_believed(tmp_path):
    out = output_of(tmp_path / "out")
    (line,) = problems_of(check_output, out, "push")
    assert "in it is of no earlier output of this kind" in line
    for marker, foreign in MARKERS:
        if isinstance(marker, str):
            write(out / MARKER, marker)
        else:
            lie(out, **marker)
        (line,) = problems_of(check_output, out, "export")
        # The order of files is that of names, and a marker comes first.
        assert f"and {out / foreign} in it" in line
    (out / MARKER).unlink()
    os.mkfifo(out / MARKER)
    assert listed(out, KIND) == {} == listed(tmp_path, "run")


def test_no_input_and_no_place_that_you_are_in_is_replaced(inputs, tmp_path, monkeypatch):
    """Nor by another name of it; and no output lies where the next command looks for adapters."""
    monkeypatch.chdir(tmp_path)
    for output in (Path(), Path(".."), tmp_path, write(tmp_path / "file")):
        assert problems_of(check_output, output, KIND)
    sources, link = find_adapters(str(inputs / "adapters")), tmp_path / "link"
    link.symlink_to(inputs)
    for out in (inputs, link):
        lines = problems_of(check_output, out, "convert", (), sources, str(link / "model"))
        places = [line.split("replace the ")[1].split(" ")[0] for line in lines]
        assert places == ["model", "adapters"]
    (line,) = problems_of(check_output, inputs, "export", [("pack", inputs / "model")])
    assert f"would replace the pack {inputs / 'model'}" in line
    for out in (inputs / "adapters" / "merged", inputs / "adapters" / "runs" / "first"):
        (line,) = problems_of(check_output, out, "convert", (), sources)
        assert f"output: {out} is in the adapters' folder {inputs / 'adapters'}" in line
    # One that is named itself is no folder of them, and a model of the hub is no path.
    alone = find_adapters(str(inputs / "adapters" / "alpha"))
    check_output(inputs / "adapters" / "merged", "convert", (), alone, "org/name")


@pytest.mark.parametrize("below", ["adapters", "refining", "pack"])
@pytest.mark.parametrize("option", ["adapters", "tasks", "model"])
def test_a_run_replaces_no_input(inputs, tmp_path, option, below):
    """Wherever it lies in what the run writes, a single file of rows too; links lead there."""
    out = tmp_path / "out"
    there = out / below / "mine" / option
    there.parent.mkdir(parents=True)
    (inputs / option).rename(there)
    (inputs / option).symlink_to(there)
    for path in (there, inputs / option):
        (line,) = problems_of(checked, out, inputs, **{option: path})
        assert f"writes {out / below} anew, which would replace the {option} {path}" in line
    rows = inputs / "tasks" / "beta" / "test.jsonl"
    if option == "model":
        rows.rename(out / "losses.json")
        rows.symlink_to(out / "losses.json")
        lines = problems_of(checked, out, inputs)
        assert any(f"{out / 'losses.json'} anew" in line and str(rows) in line for line in lines)


@pytest.mark.slow
def test_what_a_run_writes_is_known(lib, tmp_path):
    config = config_of(lib, tmp_path / "run", budget="60%", baselines=())
    run(config, until="pack", quiet=True)
    output = run(config.replace(budget="1", refine=True), quiet=True).output
    others = {"refining", "answered", "weights.json"}
    assert {path.name for path in output.iterdir()} | others == set(RUN_WRITES)
    assert set(listed(output, "run")) == set(RUN_WRITES)
    for folder in (output / "adapters", output / "merged"):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("adapter*.*")}
        assert set(listed(folder, "run")) == files
    # A pack is known by its manifest.
    assert not (output / "pack" / MARKER).exists()


@pytest.mark.parametrize("name", ["export", "push", "convert"])
def test_every_command_checks_its_output_and_marks_it(cli, lib, name):
    about = Manifest(model="org/base", config_hash="0" * 64, n_layers=2, budget="2")
    pack = write_pack(cli.root / "run" / "pack", [adapter_of("one")], about).path
    words, source = {
        "export": (["export", pack, "--to", "mlx"], pack),
        "push": (["push", pack, "org/name"], pack),
        "convert": (["convert", "--model", lib.model, "--adapters", lib.adapters], lib.adapters),
    }[name]
    argv = [*map(str, words), "--output"]
    out = cli.root / "out"
    for _ in range(2):
        assert cli([*argv, str(out)])[0] == 0
        paths = [path for path in out.rglob("*.*") if path.is_file() and path.name != MARKER]
        files = {path.relative_to(out).as_posix(): hash_file(path) for path in paths}
        assert listed(out, name) == files
        assert str(cli.root) not in (out / MARKER).read_text()
    assert len(find_adapters(str(out))) == (3 if name == "convert" else 1)
    mine = write(out / "mine")
    (line,) = cli.refused([*argv, str(out)])
    assert f"and {mine} in it" in line
    (line, *_) = cli.refused([*argv, str(source.parent)])
    assert f"writes {source.parent} anew, which would replace the" in line
