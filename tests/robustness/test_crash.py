"""Whatever ends a run, the next one ends with the same pack. `--kills 50` for a long night."""

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import pytest
from helpers.runs import records
from helpers.tiny import library

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import hash_tree, locked

pytestmark = pytest.mark.slow

MAIN = [sys.executable, "-c", "from d2c_mlx_cli.main import main; main()", "run"]
# Both ways through the pipeline: every stage is in one of them.
WAYS = {
    "slots": {
        "budget": "2",
        "refine": True,
        "merge_method": "linear",
    },
    "bytes": {
        "budget": "20%",
    },
}


@pytest.fixture
def inputs(tmp_path):
    """Options of a run on four tiny adapters, but for its budget and output."""
    paths = library(tmp_path, ["a", "b", "c", "d"])
    return {"model": paths.model, "adapters": paths.adapters, "tasks": paths.tasks,
            "probe_examples": 3, "test_examples": 3, }  # fmt: skip


def command(inputs, way, output):
    """The command line of a run."""
    options = {**inputs, **WAYS[way], "output": output}
    flags = ["--refine"] if options.pop("refine", False) else []
    return [*MAIN, *flags, *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]


def finish(command, cache, **options):
    """Run to the end, losses in a cache of its own."""
    environment = {**os.environ, "D2C_MLX_CACHE": str(cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def stages(output):
    """Stages that are recorded as done."""
    return {file.stem for file in records(output)}


def durations(output):
    """Seconds of each stage of a run that came to its end, in order."""
    files = sorted(records(output), key=lambda file: file.stat().st_mtime_ns)
    return {file.stem: json.loads(file.read_text())["seconds"] for file in files}


def killed(process, output, seconds, draw):
    """Kill in the middle of a stage that is drawn; the stage, or None if the run ended before."""
    names = list(seconds)
    at = draw.randrange(len(stages(output)), len(names))
    while len(stages(output)) < at and process.poll() is None:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, seconds[names[at]] + 0.02))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return (
        names[min(len(stages(output)), len(names) - 1)]
        if process.returncode == -signal.SIGKILL
        else None
    )


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments_the_pack_is_the_same(inputs, tmp_path, way, request):
    whole = finish(command(inputs, way, tmp_path / "whole"), tmp_path / "warm")
    assert whole.returncode == 0, whole.stderr
    seconds = durations(tmp_path / "whole")
    draw, runs, kills = random.Random(0), 0, []
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "cold")}

    def check(output):
        done = finish(command(inputs, way, output), tmp_path / "cold")
        assert done.returncode == 0, done.stderr
        assert hash_tree(output / "pack") == hash_tree(tmp_path / "whole" / "pack")
        load_pack(output / "pack")
        (tmp_path / "cold" / "losses.sqlite").unlink(missing_ok=True)

    while len(kills) < request.config.getoption("--kills"):
        output = tmp_path / f"run-{runs}"
        if len(stages(output)) < len(seconds) - 1:
            process = subprocess.Popen(
                command(inputs, way, output),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            at = killed(process, output, seconds, draw)
            if at:
                kills.append(at)
                continue
        check(output)
        runs += 1
    check(output)
    print(f"{way}: {len(kills)} kills, {runs + 1} packs; {dict(Counter(kills))}")


@pytest.mark.parametrize("nbytes", [0, 1_000, 20_000])
def test_no_room_on_the_disk(inputs, tmp_path, nbytes):
    """Files may grow to so many bytes: what a quota does, at several points of a run."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

    run = command(inputs, "bytes", tmp_path / "run")
    failed = finish(run, tmp_path / "cache", preexec_fn=limit)
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1, failed.stderr
    done = finish(run, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    load_pack(tmp_path / "run" / "pack")


def test_an_output_that_cannot_be_written(inputs, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    failed = finish(command(inputs, "bytes", tmp_path / "file" / "run"), tmp_path / "cache")
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path}/file/run: Not a directory\n"


def losses(cache):
    """How many losses are in a cache directory by now."""
    try:
        with sqlite3.connect(f"file:{cache}/losses.sqlite?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM losses").fetchone()[0]
    except sqlite3.OperationalError:  # not there, or no table yet
        return 0


def test_an_interrupt_is_said_in_one_line(inputs, tmp_path):
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command(inputs, "slots", tmp_path / "run"), env=environment, stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell interrupts are ignored, which a process inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while losses(tmp_path / "cache") < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, problem = process.communicate()
    assert process.returncode == 130
    assert problem == "interrupted; the same command continues where it stopped\n"


def test_a_second_process_says_who_holds_the_run_and_leaves(inputs, tmp_path):
    output = tmp_path / "run"
    with locked(output):
        second = finish(command(inputs, "bytes", output), tmp_path / "cache")
    assert second.returncode == 1
    assert second.stderr == (
        f"error: {output}: another process is running here; wait for it or give another --output\n"
    )
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from d2c_mlx.utils.files import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert dead.returncode == -signal.SIGKILL
    with locked(tmp_path):
        with pytest.raises(D2CError, match="another process is running here"), locked(tmp_path):
            pass


def test_waiting_for_a_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from d2c_mlx.utils.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(0.5)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with locked(tmp_path, wait=True):
        assert other.poll() == 0 or other.wait(5) == 0
    assert other.wait() == 0
    other.stdout.close()
