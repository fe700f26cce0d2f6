"""The command in processes of its own, on several ranks; and a disk without room."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MAIN = "import d2c_mlx, sys; from d2c_mlx_cli.main import main; main()"


def started(words, **environment):
    """The command in a process of its own, with variables of its environment."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, words)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **environment},
        # In the background of a shell interrupts are ignored, which a process inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


# Ends the process with a word at the first socket, whoever opens it, in whatever thread.
WATCHED = """
import os, sys

def refuse(event, args):
    if event.startswith("socket."):
        os.write(2, f"opened: {event} {args}\\n".encode())
        os._exit(9)

sys.addaudithook(refuse)
from d2c_mlx_cli.main import main
main()
"""


def launch(n, arguments, cache, program=MAIN, port=0, disturb=lambda process: None):
    """Run the command on n ranks; ports differ so that tests may run side by side."""
    command = [BIN / "mlx.launch", "-n", str(n), "--backend", "ring", "--starting-port",
               str(41000 + port), "--", sys.executable, "-c", program, *arguments]  # fmt: skip
    environment = {**os.environ, "D2C_MLX_CACHE": str(cache)}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    ) as process:  # fmt: skip
        try:
            disturb(process)
            out, err = process.communicate(timeout=240)
        except BaseException:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def no_room(nbytes):
    """No file grows beyond so many bytes inside the block; Python ignores the signal of that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
