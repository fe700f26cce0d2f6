"""Several ranks on loopback with the ring backend give the bytes that one process gives."""

import json
import os
import subprocess
import sys

import pytest
from helpers.processes import MAIN, launch
from helpers.tiny import library

from d2c_mlx.utils.environment import loaded_blas
from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.slow


def options(paths, output, **more):
    values = {"model": paths.model, "adapters": paths.adapters, "tasks": paths.tasks}
    values |= {"output": output, "budget": "1"}
    values |= more
    return ["run", *(f"--{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("ranks"), ["a", "b", "c"])


@pytest.fixture(scope="module")
def alone(paths, tmp_path_factory):
    """The run of one process, with its own cold cache."""
    root = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-c", MAIN, *options(paths, root / "run")]
    environment = {**os.environ, "D2C_MLX_CACHE": str(root / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return root / "run"


@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(n, paths, alone, tmp_path):
    """Workers get a useless command line, as on a Mac without these files."""
    program = (
        "import os, sys\n"
        "if os.environ['MLX_RANK'] != '0': sys.argv[1:] = ['run', '--adapters', 'nowhere']\n" + MAIN
    )
    done = launch(n, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=10 * n)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    assert done.stdout.count("| pack |") == 1  # workers print nothing
    for name in ("pack", "losses.json", "clusters.json", "merges.json"):
        assert hash_tree(tmp_path / "run" / name) == hash_tree(alone / name)


def test_a_planned_pack_has_the_same_bytes(paths, tmp_path):
    """What the own adapters expect is sent to workers too."""
    one, two = (options(paths, tmp_path / n / "run", budget="60%") for n in ("one", "two"))
    command = [sys.executable, "-c", MAIN, *one]
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "one" / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    done = launch(2, two, tmp_path / "two" / "cache", port=40)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    for name in ("pack", "plan.json"):
        found = {hash_tree(tmp_path / n / "run" / name) for n in ("one", "two")}
        assert len(found) == 1


def test_bad_input_ends_all_ranks(paths, tmp_path):
    arguments = options(paths, tmp_path / "run", tasks=tmp_path / "missing")
    done = launch(2, arguments, tmp_path / "cache", port=60)
    assert "rank 0 exited with code 2" in done.stderr  # mlx.launch itself always returns 0
    assert "no such directory" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_worker_with_another_model_is_named(paths, tmp_path):
    program = (
        "import os, d2c_mlx, d2c_mlx.models.model as m\n"
        "if os.environ['MLX_RANK'] == '1': m._ENGINE = 'other'\n" + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=70)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    assert "error: rank 1: " in text and "is not the base model that rank 0 has" in text
    assert not (tmp_path / "run").exists()


def test_a_rank_that_computes_otherwise_is_named(paths, tmp_path):
    """Another version of MLX and, where there is one, no fast BLAS."""
    program = (
        "import os, importlib.metadata as m\n"
        "if os.environ['MLX_RANK'] == '1':\n"
        "    os.environ['D2C_MLX_BLAS'], version = 'off', m.version\n"
        "    m.version = lambda name: '0.1' if name == 'mlx' else version(name)\n" + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=90)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert (
        line.startswith("error: rank 1: MLX: found 0.1, rank 0 has ") and "make them equal" in line
    )
    assert ("BLAS: found None, rank 0 has /" in line) == (loaded_blas() is not None)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_ends_the_run(paths, tmp_path):
    """The ring backend returns what was in memory then, and waits for ever after that."""
    program = (
        "import os, d2c_mlx, d2c_mlx.evaluate.distributed as r\n"
        "if os.environ['MLX_RANK'] == '1': r._evaluate = lambda *_: os.kill(os.getpid(), 9)\n"
        + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=100)
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "| pack |" not in text
    assert "Node with rank 1 exited with code -9" in text  # of mlx.launch


SHARED = """
import sys
import d2c_mlx, d2c_mlx.evaluate.distributed as r
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.model import Model
from d2c_mlx.models.examples import Example, ExampleSet
row, rounds, evaluate = Example(tuple(range(1, 31)), 20), [], r._evaluate
def pieces(n, n_rows):
    return [(None, ExampleSet(f"{n_rows}-{i}", (row,) * n_rows)) for i in range(n)]
def counted(*arguments):
    rounds.append(len(evaluate(*arguments)))
    return evaluate(*arguments)
r._evaluate, group = counted, r.launched_group()
if group.rank():
    r.run_worker(group)
else:
    with r.leading_rank():
        engine = Engine(Model(sys.argv[1]))
        ranks = r.Ranks(engine, group)
        for n, n_rows in ((1, 2), (6, 2), (7, 2), (4, 450)):
            ours, theirs = (dict(x.run(pieces(n, n_rows))) for x in (ranks, engine))
            assert [ours[i].tolist() for i in range(n)] == [theirs[i].tolist() for i in range(n)]
    print("rounds", rounds)
"""


def test_every_rank_has_about_as_many_tokens_of_each_round(paths, tmp_path):
    """Also of sets of 13,500 tokens, which fill a round alone: a piece for each rank."""
    done = launch(2, [paths.model], tmp_path / "cache", SHARED, port=80)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "rounds" in line)
    assert json.loads(line.split("rounds")[1]) == [1, 3, 4, 1, 1]
