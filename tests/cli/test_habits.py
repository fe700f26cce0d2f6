"""What one expects of any command line."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from d2c_mlx_cli.topics import TOPICS
from helpers import ROOT

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.environment import VERSION

BUSY = """
import hashlib, os, signal, threading
from d2c_mlx_cli.interrupt import interrupts_told
# Not before the main thread is in a call that runs no Python.
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
with interrupts_told():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)
"""


def test_the_version_in_short_and_as_a_module(command):
    assert command("-V") == command("--version") == (0, f"d2c-mlx, version {VERSION}\n", "")
    argv = [sys.executable, "-m", "d2c_mlx", "-V"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"d2c-mlx, version {VERSION}\n")


def test_ctrl_c_is_answered_before_the_step_at_work_ends():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stderr=subprocess.PIPE,
        # In the background of a shell interrupts are ignored, which a process inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        word = b"\nstopping at the end of this step; what is done is kept\n"
        assert process.stderr.read(len(word)) == word
        # Otherwise the word would come with the end.
        assert process.poll() is None
        process.kill()


def test_help_of_a_command_and_of_a_topic(command):
    assert command("help", "merge") == command("merge", "--help")
    assert command("help")[1] == command("--help")[1]
    for topic, text in TOPICS.items():
        assert command("help", topic) == (0, f"{text}\n", "")
        assert topic in command("help", "--help")[1]
    code, _, err = command("help", "nothing")
    assert code == 2 and "nothing: no command and no topic; topics: environment" in err


def test_a_stage_s_help_has_its_own_options_and_takes_the_others(command):
    text = command("merge", "--help")[1]
    assert "\nMerge:\n" in text and "\nSearch:\n" not in text
    code, _, err = command("merge", "--seed", "x")
    assert code == 2 and "'x' is not a valid integer" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    env = {**os.environ, "_D2C_MLX_COMPLETE": f"{shell}_source"}
    argv = [sys.executable, "-m", "d2c_mlx"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "d2c-mlx" in done.stdout
    assert f"_D2C_MLX_COMPLETE={shell}_source" in TOPICS["completion"]


def test_every_variable_that_is_read_is_documented():
    """In the help, of which docs/reference/topics.md is made."""
    code = "".join(path.read_text() for path in (*ROOT.glob("d2c_mlx/**/*.py"),
                                                  *ROOT.glob("cli/*.py")))  # fmt: skip
    for name in re.findall(r"\bD2C_MLX_[A-Z0-9]+\b|\bMLX_ENABLE_\w+", code):
        assert name in TOPICS["environment"]


def test_a_log_file_has_stages_warnings_and_errors(cli, tmp_path):
    log = tmp_path / "log.txt"
    argv = [*cli.argv("probe", "-q"), "--log-file", str(log)]
    code, _, err = cli(argv)
    assert (code, err) == (0, "")
    text = log.read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d .*found 3 adapters of model", text, re.MULTILINE)
    assert "probe: done, 0:00:0" in text
    code, _, err = cli([*argv, "--memory-limit", "1KB"])
    assert code == 2 and log.read_text().endswith(err)


def test_a_run_ends_in_words(cli):
    """The verdict, three commands, of which two are tried, and sizes of what is unpacked."""
    argv = cli.argv("run", "-q", budget="60%", probe_examples=2, test_examples=2)
    code, out, err = cli(argv)
    assert (code, err) == (0, "")
    assert "3 adapters, " in out and "unpacked for other programs" in out
    words = out[out.index("Next:") :].splitlines()
    assert [line.split()[1] for line in words[1:4]] == ["generate", "unpack", "serve"]
    run = str(cli.output)
    code, out, err = cli(["generate", run, "--task", "alpha", "--model", str(cli.lib.model),
                          "--max-tokens", "4", "What?"])  # fmt: skip
    assert code == 0 and err.startswith(f"model: {cli.lib.model}\nd2c-mlx unpack ")
    assert cli(["generate", run, "--task", "alpha", "--model", str(cli.lib.model),
                "--max-tokens", "4", "-q", "What?"]) == (0, out, "")  # fmt: skip
    code, out, _ = cli(["unpack", run, "--output", str(cli.root / "plain")])
    files = (cli.root / "plain").glob("*/adapter*")
    nbytes = sum(file.stat().st_size for file in files)
    assert f"{nbytes:,} bytes, of {load_pack(run).nbytes:,} in the pack\n" in out
    bench = json.loads((cli.output / "bench.json").read_text())
    assert bench["unpacked_nbytes"] == nbytes


def test_equal_rows_are_one(cli):
    argv = cli.argv("run", "-q", probe_examples=2, test_examples=2, baselines="")
    out = cli(argv)[1]
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert sorted(names) == ["base", "individual", "method", "pack"]
    text = (cli.output / "report.md").read_text() + (cli.output / "report.html").read_text()
    assert "random" not in text
