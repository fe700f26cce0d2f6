"""What a new user types wrongly, and the line that says how it is typed."""

import shutil

import pytest
from helpers.command import NAMES
from helpers.tiny import task

from d2c_mlx.models.tasks import load_task
from d2c_mlx.utils.errors import InputWarning


def test_a_pattern_in_place_of_a_folder(cli, lib, monkeypatch):
    """As a shell leaves it in quotes, and as it expands it."""
    cli.fails_with(f"{lib.adapters / '*'}: ", "without *", adapters=lib.adapters / "*")
    paths = [str(lib.adapters / name) for name in NAMES[:2]]
    code, out, err = cli(["run", "--adapters", *paths, "--output", str(cli.output)])
    assert (code, out) == (2, "") and "a folder of adapters is --adapters FOLDER" in err


def test_a_directory_in_place_of_a_file(cli, lib, tmp_path):
    code, _, err = cli(["run", str(lib.adapters)])
    assert code == 2 and "an earlier run --output DIR" in err
    code, _, err = cli(["tasks", "split", str(lib.tasks), "--output", str(tmp_path / "t")])
    assert (code, err) == (2, f"error: {lib.tasks}: a directory, expected a JSONL file of rows\n")


def test_a_task_that_is_called_otherwise(cli, lib):
    (lib.tasks / "beta").rename(lib.tasks / "beta_task")
    cli.fails_with(
        f"{lib.tasks / 'beta'}: missing; found beta_task, which no adapter is called.",
        "--adapters NAME=PATH/beta",
    )
    (lib.tasks / "gamma").rename(lib.tasks / "beta_tasks")
    assert cli.fails()[1].endswith("--adapters NAME=PATH/gamma")


def test_tasks_without_an_adapter_are_named(cli, lib):
    task(lib.tasks, "delta")
    with pytest.warns(InputWarning, match="tasks: no adapter is called delta, so these rows are"):
        assert cli(cli.argv(until="probe"))[0] == 0


def test_rows_as_mlx_lm_has_them(cli, lib):
    """`valid.jsonl` are the calibration rows; `probe.jsonl` goes before it."""
    beta = lib.tasks / "beta"
    shutil.copyfile(beta / "probe.jsonl", beta / "valid.jsonl")
    expected = load_task(beta)
    (beta / "probe.jsonl").unlink()
    found = load_task(beta)
    assert found == expected and found.probe[0].place.startswith(str(beta / "valid.jsonl"))
    assert cli(cli.argv(until="probe"))[0] == 0
    (beta / "valid.jsonl").rename(beta / "train.jsonl")
    with pytest.raises(Exception, match=f"tasks split {beta / 'train.jsonl'} --output DIR"):
        load_task(beta)


def test_bad_adapters_are_left_out_if_asked(cli, lib):
    """One that cannot be read and one without rows are listed; without the option they end it."""
    (lib.adapters / "beta" / "adapter_config.json").unlink()
    shutil.rmtree(lib.tasks / "gamma")
    assert len(cli.fails()) == 3
    with pytest.warns(InputWarning, match=r"skip_bad: left out 2 of 3: beta \(.*missing.*; gamma"):
        code, out, _ = cli([*cli.argv(until="pack"), "--skip-bad"])
    assert code == 0 and "1 adapters for 1 tasks" in cli(["verify", str(cli.output)])[1]
