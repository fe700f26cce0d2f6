"""Locks on directories, also on those that somebody sent."""

import os
import subprocess
import sys

import pytest

from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import held, is_held, locked

# Holds a directory until its standard input ends.
HOLD = (
    "import sys; from pathlib import Path; from d2c_mlx.utils.files import held\n"
    "with held(Path(sys.argv[1]), shared=True): print('held', flush=True); sys.stdin.read()"
)


@pytest.mark.parametrize("kind", ["link", "hard link", "text", "pipe"])
def test_a_lock_file_that_is_not_ours_is_left_alone(tmp_path, kind):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine" if kind != "hard link" else "")
    run.mkdir()
    lock = run / ".lock"
    if kind == "link":
        lock.symlink_to(mine)
    elif kind == "hard link":
        lock.hardlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text("mine")
    before = mine.read_text(), lock.lstat()
    with pytest.raises(D2CError, match=r"run/\.lock: is no lock file of d2c-mlx"):
        with locked(run):
            raise AssertionError("the body ran")
    assert (mine.read_text(), lock.lstat()) == before


def test_a_link_to_nothing_makes_no_file(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(D2CError, match="is no lock file"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "made").exists()


def test_readers_share_a_directory_and_a_writer_waits_for_them(tmp_path, monkeypatch):
    assert not is_held(tmp_path)
    reader = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert reader.stdout.readline() == b"held\n"
    with held(tmp_path, shared=True):
        assert is_held(tmp_path)
    monkeypatch.setattr("d2c_mlx.utils.files._WAIT_SECONDS", 0)
    with pytest.raises(D2CError, match="another process has been at work here"), held(tmp_path):
        pass
    reader.communicate()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_not_held(tmp_path):
    with held(tmp_path / "none"):
        assert not is_held(tmp_path / "none")
    assert not (tmp_path / "none").exists()
