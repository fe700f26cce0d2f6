"""The same inputs give the same bytes, whatever else differs.

Any number of ranks that merge: test_ranks.py. Killed at random moments: test_crash.py. The order of
adapters within one merge: test_merge.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.processes import MAIN, launch
from helpers.runs import records
from helpers.tiny import Library, library, peft_adapter, task, tiny_model

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig, stages_of
from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c", "d"]
# Both ways through the pipeline: every stage is in one of them.
WAYS = {
    "slots": {"budget": "2", "refine": True},
    "bytes": {"budget": "20%"},
}
ARTIFACTS = ("losses.json", "clusters.json", "merges.json", "plan.json", "pack")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("library"), NAMES)


def config_of(paths, output, way):
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        output=str(output), probe_examples=3, test_examples=2,         **WAYS[way],
    )  # fmt: skip


def hashes(output):
    """Of everything that a run decides; times, versions and paths are in other files."""
    found = {name: hash_tree(output / name) for name in ARTIFACTS if (output / name).exists()}
    if (output / "refines.json").exists():
        facts = json.loads((output / "refines.json").read_text())
        found["refines"] = [{**one, "seconds": None} for one in facts]
    return found


@pytest.fixture(scope="module", params=WAYS)
def whole(request, paths, tmp_path_factory):
    """A way, and the undisturbed run of it in this process with a cold cache."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2C_MLX_CACHE", str(root / "cache"))
        run(config_of(paths, root / "run", request.param), quiet=True)
    return request.param, root


def evaluated(output):
    """Evaluations that were done, of all stages."""
    found = [json.loads(path.read_text()) for path in records(output)]
    return sum(record["evaluations"]["done"] for record in found)


def test_a_warm_cache(whole, paths, tmp_path, monkeypatch):
    way, root = whole
    monkeypatch.setenv("D2C_MLX_CACHE", str(root / "cache"))
    output = run(config_of(paths, tmp_path / "run", way), quiet=True).output
    assert evaluated(root / "run") > 0 and evaluated(output) == 0
    assert hashes(output) == hashes(root / "run")


def test_resumed_after_every_stage(whole, paths, tmp_path, monkeypatch):
    way, root = whole
    config, done = config_of(paths, tmp_path / "run", way), set()
    for i, stage in enumerate(stages_of(config)):
        monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / f"cache-{i}"))  # cold each time
        run(config, until=stage, quiet=True)
        done |= {path.stem for path in (tmp_path / "run" / ".stages").glob("*.json")}
    assert done == {path.stem for path in (root / "run" / ".stages").glob("*.json")}
    assert hashes(tmp_path / "run") == hashes(root / "run")


def test_another_order_on_disk_and_of_hashes(whole, paths, tmp_path):
    """A file system that lists by age, directories made in another order; sets in another order."""
    way, root = whole
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as directory:
        here = Path(directory)
        listed = []
        for order in (NAMES, [NAMES[i] for i in (2, 0, 3, 1)]):
            copy = Library(paths.model, here / f"adapters-{order[0]}", here / f"tasks-{order[0]}")
            for name in order:
                shutil.copytree(paths.adapters / name, copy.adapters / name)
                shutil.copytree(paths.tasks / name, copy.tasks / name)
            listed.append(os.listdir(copy.adapters))
        if listed[0] == listed[1]:
            pytest.skip(f"the file system of {here} lists in one order whatever came first")
        config = config_of(copy, tmp_path / "run", way).to_dict()
        flags = ["--refine"] if config.pop("refine") else []
        given = {k: ",".join(v) if isinstance(v, list) else v for k, v in config.items() if v}
        flags += [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if v is not True]
        # The hash seed of this process is another one.
        environment = {**os.environ, "PYTHONHASHSEED": "1", "D2C_MLX_CACHE": str(tmp_path / "cold")}
        done = subprocess.run([sys.executable, "-c", MAIN, "run", *flags],
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "run") == hashes(root / "run")


@pytest.mark.parametrize("whole", ["bytes"], indirect=True)
def test_two_ranks_plan_the_same(whole, paths, tmp_path):
    way, root = whole
    config = config_of(paths, tmp_path / "run", way)
    flags = [f"--budget={config.budget.text}"] + [
        f"--{name.replace('_', '-')}={getattr(config, name)}"
        for name in ("model", "adapters", "tasks", "output", "probe_examples", "test_examples")
    ]
    done = launch(2, ["run", *flags], tmp_path / "cache", port=90)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    assert hashes(tmp_path / "run") == hashes(root / "run")


@pytest.mark.parametrize("way", WAYS)
def test_ties_are_broken_by_name(way, tmp_path, monkeypatch):
    """Adapters that are the same in all but their names: the names' order decides, no hash."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    model = tiny_model(tmp_path / "model")
    found = []
    for names in ("abcd", "wzyx"):
        paths = Library(model, tmp_path / names / "adapters", tmp_path / names / "tasks")
        for name in names:
            # Two pairs of twins: what is in common, and what is not, by position.
            twin = sorted(names).index(name) % 2
            peft_adapter(paths.adapters, name, seed=twin)
            shutil.move(task(tmp_path / names / "made", str(twin)), paths.tasks / name)
        # Refining draws rows by the task's name, so that a task draws alike in any company.
        config = config_of(paths, tmp_path / names / "run", way).replace(refine=False)
        output = run(config, quiet=True).output
        pack = load_pack(output / "pack")
        served = [pack.load(name) for name in sorted(names)]
        labels = None
        if way == "slots":
            labels = json.loads((output / "clusters.json").read_text())["methods"]["d2c"]
        found.append(([one and one.digest for one in served], labels,
                      [pack.tasks[name] for name in sorted(names)]))  # fmt: skip
    assert found[0] == found[1]
