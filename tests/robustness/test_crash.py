"""Whatever ends a run, the next one ends with the same pack. `--kills 50` for a long night."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest
from d2c_mlx_cli.main import main
from helpers.processes import launch, no_room, started
from helpers.runs import flags_of, records, seconds_of
from helpers.tiny import refinable, task

from d2c_mlx import D2CError, load_pack
from d2c_mlx.utils.files import hash_tree, locked

pytestmark = pytest.mark.slow


@pytest.fixture
def argv(config_of):
    """The words of a run, by its way and output."""
    return lambda way, output: ["run", *flags_of(config_of(way, output))]


def in_process(words, cache):
    """The exit code of the command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("D2C_MLX_CACHE", str(cache))
        patch.setattr(sys, "argv", ["d2c-mlx", *words])
        main()
    return ended.value.code


def killed(process, output, seconds, draw):
    """Kill in the middle of a stage that is drawn; the stage, or None if the run ended before."""
    names, done = list(seconds), lambda: len(records(output))
    at = draw.randrange(done(), len(names))
    while done() < at and process.poll() is None:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, seconds[names[at]] + 0.02))
    process.kill()
    process.communicate()
    return names[min(done(), len(names) - 1)] if process.returncode < 0 else None


def test_killed_at_random_moments_the_pack_is_the_same(whole, argv, tmp_path, request):
    way, good = whole[0], whole[1] / "run"
    seconds, draw, runs, kills = seconds_of(good), random.Random(0), 0, []
    while len(kills) < request.config.getoption("--kills"):
        output, cache = tmp_path / f"run-{runs}", tmp_path / f"cache-{runs}"
        if len(records(output)) < len(seconds) - 1:
            process = started(argv(way, output), D2C_MLX_CACHE=str(cache))
            at = killed(process, output, seconds, draw)
            kills += [at] if at else []
            if at and len(kills) < request.config.getoption("--kills"):
                continue
        assert in_process(argv(way, output), cache) == 0
        assert hash_tree(output / "pack") == hash_tree(good / "pack")
        load_pack(output / "pack")
        runs += 1
    print(f"{way}: {len(kills)} kills, {runs} packs; {dict(Counter(kills))}")


@pytest.mark.soak
def test_killed_while_it_composes_the_adapter_is_the_same(tmp_path):
    paths, draw, seconds = refinable(tmp_path / "library", ("a", "b")), random.Random(0), 0
    task(tmp_path / "tasks", "new", n_probe=5)
    words = ["compose", f"--from={paths.adapters}", f"--model={paths.model}", "--anyway"]
    words.append(f"--task={tmp_path / 'tasks' / 'new'}")
    hashes, begun = set(), time.monotonic()
    for i in range(11):
        output, cache = tmp_path / f"{i}" / "new", tmp_path / f"cache-{i}"
        if i:
            process = started([*words, f"--output={output}"], D2C_MLX_CACHE=str(cache))
            time.sleep(draw.uniform(seconds / 3, seconds))
            process.kill()
            process.communicate()
        process = started([*words, f"--output={output}"], D2C_MLX_CACHE=str(cache))
        assert not process.communicate()[1].count("error") and process.returncode == 0
        seconds = seconds or time.monotonic() - begun
        hashes.add(hash_tree(output / "adapters.safetensors"))
        assert [path.name for path in output.parent.iterdir()] == ["new"]
    assert len(hashes) == 1


@pytest.mark.soak
def test_a_killed_rank_ends_the_other_and_the_pack_is_the_same(whole, argv, tmp_path):
    """At random moments, also before the ranks have met: there mlx.launch ends the other."""
    way, good, draw, kills, runs = whole[0], whole[1] / "run", random.Random(0), [], 0

    def kill(process):
        ranks = {}
        while len(ranks) < 2 and process.poll() is None:
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.Error, KeyError):
                    ranks[child.environ()["MLX_RANK"]] = child
        time.sleep(draw.uniform(0, seconds))
        with suppress(psutil.Error, KeyError):  # it may have ended
            ranks[str(len(kills) % 2)].kill()

    begun = time.monotonic()
    launch(2, argv(way, tmp_path / "whole"), tmp_path / "cache", port=200)
    seconds = time.monotonic() - begun
    while len(kills) < 5:
        output, cache = tmp_path / f"run-{runs}", tmp_path / f"cache-{runs}"
        done = launch(2, argv(way, output), cache, port=200, disturb=kill)
        assert "Traceback" not in done.stderr, done.stderr
        if f"rank {len(kills) % 2} exited with code -9" in done.stderr:
            kills.append(len(records(output)))
        assert in_process(argv(way, output), cache) == 0
        assert hash_tree(output / "pack") == hash_tree(good / "pack")
        runs += 1
    print(f"{way}: 5 ranks killed, after {kills} stages")


def test_a_full_disk_and_room_again(whole, argv, tmp_path, capsys):
    """Files grow to so many bytes only; each run ends in one line, the last in the same pack."""
    way, good = whole[0], whole[1] / "run"
    for nbytes in (0, 1_000, 3_000, 20_000):
        with no_room(nbytes):
            assert in_process(argv(way, tmp_path / "run"), tmp_path / f"cache-{nbytes}") == 1
        problem = capsys.readouterr().err
        assert problem.startswith("error: ") and problem.count("\n") == 1, problem
        assert not list((tmp_path / "run").rglob("*.tmp*")), "half-written"
    # A cache that could not be written whole is good for the next run.
    # Nor does what a killed process left stay.
    cache, left = tmp_path / "cache-20000", tmp_path / "run" / ".bench.json.0123abcd.tmp"
    left.write_text("[")
    assert in_process(argv(way, tmp_path / "run"), cache) == 0
    assert hash_tree(tmp_path / "run" / "pack") == hash_tree(good / "pack") and not left.exists()
    connection = sqlite3.connect(cache / "losses.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_an_interrupt_is_said_in_one_line(argv, tmp_path):
    process = started(argv("slots", tmp_path / "run"), D2C_MLX_CACHE=str(tmp_path / "cache"))
    while not records(tmp_path / "run") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, problem = process.communicate()
    assert process.returncode == 130
    assert problem == "\ninterrupted; the same command continues where it stopped\n"


def test_what_cannot_be_written_or_is_in_use_is_left_alone(argv, paths, tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    assert in_process(argv("bytes", tmp_path / "file" / "run"), tmp_path / "cache") == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/file/run: Not a directory\n"
    output = tmp_path / ("x" * 250)  # too long for a temporary name beside it
    words = ["convert", "--adapters", str(paths.adapters), "--output", str(output)]
    assert in_process([*words, "--model", str(paths.model)], tmp_path / "cache") == 1
    assert capsys.readouterr().err == f"error: {output}: File name too long\n"
    output = tmp_path / "run"
    with locked(output):
        assert in_process(argv("bytes", output), tmp_path / "cache") == 1
    assert capsys.readouterr().err.startswith(f"error: {output}: another process is running here")
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_the_lock_of_another_process_is_waited_for_and_that_of_a_dead_one_free(tmp_path):
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from d2c_mlx.utils.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(0.5)\n"
        "    if 'die' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for end in ("live", "die"):
        words = [sys.executable, "-c", script, str(tmp_path), end]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(D2CError, match="another process is running here"):
                locked(tmp_path).__enter__()
            with locked(tmp_path, wait=True):
                assert (other.wait() < 0) == (end == "die")
