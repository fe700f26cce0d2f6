"""Servers in processes of their own, for the measurements of this folder."""

import http.client
import json
import socket
import sys
import time
from contextlib import closing, contextmanager, suppress

import psutil

# In a command, the port that the server is to take.
PORT = "{port}"
OURS = [sys.executable, "-c", "from d2c_mlx_cli.main import main; main()", "serve", "--port", PORT]


@contextmanager
def server(command, seconds=600):
    """Start a server on a free port.

    Yields:
        Its host and port, and its process, once `/health` says that it is ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    words = [str(address[1]) if one == PORT else str(one) for one in command]
    # The server writes to the error stream: the output is a script's own.
    with psutil.Popen(words, stdout=sys.stderr) as process:
        try:
            _wait(address, process, seconds)
            yield address, process
        finally:
            # It may have ended by now, as it was told to.
            for end in (process.terminate, process.kill):
                with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    end()
                    process.wait(60)
                    break


def _wait(address, process, seconds):
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
                connection.request("GET", "/health")
                # One that wants a token is ready, too.
                if connection.getresponse().status != 503:
                    return
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{process.args[0]} did not start")
        time.sleep(0.2)


def cpu_seconds(process):
    """Seconds of processors that a process has used."""
    times = process.cpu_times()
    return times.user + times.system


def health(address, token="-"):
    """A server's facts about itself; empty for servers that give none."""
    with closing(http.client.HTTPConnection(*address, timeout=600)) as connection:
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {token}"})
        content = json.loads(connection.getresponse().read())
    return {key: value for key, value in content.items() if isinstance(value, int)}
