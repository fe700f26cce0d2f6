"""What leaves the machine, and what a pack tells of it: nothing."""

import getpass
import json
import platform
import subprocess
import sys

import pytest
from helpers.processes import WATCHED
from helpers.tiny import library, peft_adapter

from d2c_mlx.adapters.checks import base_name

pytestmark = pytest.mark.slow


@pytest.fixture(params=["2", "60%"])
def command(request, tmp_path):
    """A run on absolute paths; its adapters were trained from one, too."""
    paths = library(tmp_path, ["a", "b", "c"])
    secret = str(tmp_path / "models" / "tiny")
    peft_adapter(paths.adapters, "a", base_model_name_or_path=secret)
    return ["run", f"--model={paths.model}", f"--adapters={paths.adapters}",
            f"--tasks={paths.tasks}", f"--budget={request.param}", f"--output={tmp_path / 'run'}",
            "--probe-examples=2", "--test-examples=2"]  # fmt: skip


def test_a_run_opens_no_socket_and_a_pack_tells_nothing(command, tmp_path):
    done = subprocess.run([sys.executable, "-c", WATCHED, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run" / "pack").rglob("*") if path.is_file()]
    files += (tmp_path / "run").glob("report.*")
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        for secret in (str(tmp_path), platform.node()):
            assert secret.encode() not in content, path
        # A short name such as "root" may be a word of the report.
        assert f"/{getpass.getuser()}/".encode() not in content, path
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_watch_sees_a_socket():
    code = WATCHED.split("from d2c")[0] + "import socket; socket.create_connection(('::1', 9))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9 and "opened: socket." in done.stderr


@pytest.mark.parametrize(
    "stated, name",
    [("org/model", "org/model"), ("/home/jane/models/tiny", "tiny"), ("~/models/tiny", "tiny"),
     ("C:\\Users\\jane\\tiny", "tiny"), ("models/tiny", "models/tiny"), (None, None), ("", None),
     ("../jane/secret/tiny", "tiny"), ("./tiny/", "tiny"), ("file:///home/jane/tiny", "tiny"),
     ("C:models\\jane\\tiny", "tiny"), ("..\\jane\\tiny", "tiny"), ("jane@host:tiny", "tiny"),
     ("..", None), ("~jane", None), ("//server/jane/tiny", "tiny")],
)  # fmt: skip
def test_the_base_of_an_adapter(stated, name):
    config = json.loads(json.dumps({"base_model_name_or_path": stated}))
    assert base_name(config) == name
