"""The same inputs give the same bytes, whatever else differs; nothing leaves the machine.

Any number of ranks: test_ranks.py. Killed at random moments: test_crash.py. The order of
adapters within one merge: merge/test_methods.py.
"""

import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.processes import WATCHED
from helpers.runs import NAMES, WAYS, flags_of, hashes, records
from helpers.tiny import Library, peft_adapter, task, tiny_model

from d2c_mlx.adapters.checks import base_name
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import stages_of

pytestmark = pytest.mark.slow


def evaluated(output):
    """Evaluations that were done, of all stages."""
    return sum(json.loads(path.read_text())["evaluations"]["done"] for path in records(output))


def test_resumed_after_every_stage_and_from_a_warm_cache(whole, config_of, tmp_path, monkeypatch):
    way, root = whole
    config, done = config_of(way, tmp_path / "run"), set()
    for i, stage in enumerate(stages_of(config)):
        monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / f"cache-{i}"))  # cold each time
        run(config, until=stage, quiet=True)
        done |= {path.stem for path in records(tmp_path / "run")}
    assert done == {path.stem for path in records(root / "run")}
    monkeypatch.setenv("D2C_MLX_CACHE", str(root / "cache"))
    run(config_of(way, tmp_path / "warm"), quiet=True)
    assert evaluated(root / "run") > 0 and evaluated(tmp_path / "warm") == 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "warm") == hashes(root / "run")


def test_another_order_on_disk_and_of_hashes_and_no_socket(whole, paths, config_of, tmp_path):
    """A file system that lists by age, directories made in another order; sets in another order.

    The process ends at the first socket. What it wrote for others names neither paths nor people.
    """
    way, root = whole
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as directory:
        here = Path(directory)
        copy = Library(paths.model, here / "adapters", here / "tasks")
        for name in [NAMES[i] for i in (2, 0, 3, 1)]:
            shutil.copytree(paths.adapters / name, copy.adapters / name)
            shutil.copytree(paths.tasks / name, copy.tasks / name)
        # The hash seed of this process is another one.
        environment = {**os.environ, "PYTHONHASHSEED": "1", "D2C_MLX_CACHE": str(tmp_path / "cold")}
        flags = flags_of(config_of(way, tmp_path / "run", copy))
        done = subprocess.run([sys.executable, "-c", WATCHED, "run", *flags],
                              env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "run") == hashes(root / "run")
    files = [path for path in (tmp_path / "run" / "pack").rglob("*") if path.is_file()]
    files += (tmp_path / "run").glob("report.*")
    assert len(files) >= 3
    # A short name such as "root" may be a word of the report.
    secrets = str(tmp_path), str(paths.model.parent), platform.node(), f"/{getpass.getuser()}/"
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


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
def test_the_base_of_an_adapter_is_no_path(stated, name):
    assert base_name({"base_model_name_or_path": stated}) == name


@pytest.mark.parametrize("way", WAYS)
def test_ties_are_broken_by_name(way, config_of, tmp_path, monkeypatch):
    """Adapters that are the same in all but their names: the names' order decides, no hash."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    model, results = tiny_model(tmp_path / "model"), []
    for names in ("abcd", "wzyx"):
        paths = Library(model, tmp_path / names / "adapters", tmp_path / names / "tasks")
        for name in names:
            # Two pairs of twins: what is in common, and what is not, by position.
            twin = sorted(names).index(name) % 2
            peft_adapter(paths.adapters, name, seed=twin)
            shutil.move(task(tmp_path / names / "made", str(twin)), paths.tasks / name)
        # Refining draws rows by the task's name, so that a task draws alike in any company.
        config = config_of(way, tmp_path / names / "run", paths).replace(refine=False)
        output = run(config, quiet=True).output
        pack, labels = load_pack(output / "pack"), None
        served = [pack.load(name) for name in sorted(names)]
        if way == "slots":
            labels = json.loads((output / "clusters.json").read_text())["methods"]["d2c"]
        digests = [adapter and adapter.digest for adapter in served]
        results.append((digests, labels, [pack.tasks[name] for name in sorted(names)]))
    assert results[0] == results[1]
