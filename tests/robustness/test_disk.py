"""A disk that is really full: a tmpfs of a few hundred kilobytes, where we may mount one."""

import os
import sqlite3
import subprocess
import sys
from contextlib import contextmanager

import pytest
from d2c_mlx_cli.main import main
from helpers.tiny import library

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.slow

ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]
KB = 1024
# What a file takes of a tmpfs is whole pages.
PAGE = os.sysconf("SC_PAGE_SIZE")
# Both ways through the pipeline.
BUDGETS = ["2", "20%"]


def mounted(directory, nbytes, *, again=False):
    """Mount a tmpfs of so many bytes, or change its size; skips where that is not allowed."""
    directory.mkdir(exist_ok=True)
    options = f"{'remount,' if again else ''}size={nbytes},mode=777"
    try:
        done = subprocess.run([*ROOT, "mount", "-t", "tmpfs", "-o", options, "tmpfs", directory],
                              capture_output=True, text=True)  # fmt: skip
    except FileNotFoundError as error:
        pytest.skip(f"no way to mount a tmpfs: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")


@contextmanager
def disk(directory, nbytes):
    """A directory with a disk of its own."""
    mounted(directory, nbytes)
    try:
        yield directory
    finally:
        subprocess.run([*ROOT, "umount", "-l", directory], check=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("disk"), ["a", "b", "c", "d"])


@pytest.fixture
def finish(paths, monkeypatch, capsys):
    """Runs the command with a cache of its own: exit code and standard error."""

    def run(budget, output, cache, *more):
        options = {
            "model": paths.model, "adapters": paths.adapters, "tasks": paths.tasks,
            "budget": budget, "output": output, "probe-examples": 2, "test-examples": 2,
        }  # fmt: skip
        argv = [f"--{name}={value}" for name, value in options.items()]
        monkeypatch.setenv("D2C_MLX_CACHE", str(cache))
        monkeypatch.setattr(sys, "argv", ["d2c-mlx", "run", *argv, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_full_disk_and_room_again(budget, finish, tmp_path):
    """At several points of a run; each ends in one line, and the last goes on to the same bytes."""
    whole = tmp_path / "whole"
    assert finish(budget, whole, tmp_path / "cache") == (0, "")
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    nbytes = sum(-(-size // PAGE) * PAGE for size in sizes)
    with disk(tmp_path / "disk", 8 * KB) as full:
        output, ends = full / "run", []
        for share in (0.05, 0.4, 0.8):
            mounted(full, int(share * nbytes), again=True)
            code, problem = finish(budget, output, tmp_path / "cache")
            assert code == 1 and problem.startswith("error: ") and problem.count("\n") == 1
            assert "No space left on device" in problem
            assert not [path for path in output.rglob("*") if ".tmp" in path.name], "half-written"
            ends.append(len(list((output / ".stages").glob("*.json"))))
        assert ends[0] < ends[-1]  # they did not all end at the same point
        mounted(full, 4 * nbytes, again=True)
        assert finish(budget, output, tmp_path / "cache") == (0, "")
        assert hash_tree(output / "pack") == hash_tree(whole / "pack")
        load_pack(output / "pack")


@pytest.mark.parametrize("kilobytes", [0, 8, 40])
def test_a_cache_on_a_full_disk(kilobytes, finish, tmp_path):
    """No room for the file, for its first table, for its losses; then there is."""
    with disk(tmp_path / "disk", 64 * KB) as full:
        stat = os.statvfs(full)
        (full / "filler").write_bytes(bytes(stat.f_bavail * stat.f_frsize - kilobytes * KB))
        code, problem = finish("20%", tmp_path / "run", full)
        assert code == 1 and problem.count("\n") == 1, problem
        assert problem.startswith(f"error: {full}/losses.sqlite: cannot be used as the cache of")
        if not kilobytes:  # What it says helps.
            assert finish("20%", tmp_path / "other", tmp_path / "cache") == (0, "")
        (full / "filler").unlink()
        mounted(full, 4096 * KB, again=True)
        assert finish("20%", tmp_path / "run", full) == (0, "")
        with sqlite3.connect(full / "losses.sqlite") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert connection.execute("SELECT count(*) FROM losses").fetchone()[0] > 20
        connection.close()
    load_pack(tmp_path / "run" / "pack")
