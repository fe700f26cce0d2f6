"""Several ranks on loopback with the ring backend give the bytes that one process gives."""

import os
import subprocess
import sys

import pytest
from helpers.processes import MAIN, launch
from helpers.tiny import library

from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.slow


def options(paths, output, **more):
    values = {**paths._asdict(), "output": output, "budget": "1", **more}
    return ["run", *(f"--{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("ranks"), ["a", "b", "c"])


@pytest.mark.parametrize("n, budget", [(3, "1"), (2, "60%")])
def test_any_number_of_ranks_gives_the_same_bytes(n, budget, paths, tmp_path):
    """Workers get a useless command line, as on a Mac without these files."""
    alone, several = (options(paths, tmp_path / x / "run", budget=budget) for x in ("one", "more"))
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "one" / "cache")}
    command = [sys.executable, "-c", MAIN, *alone]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    change = "if os.environ['MLX_RANK'] != '0': sys.argv[1:] = ['run', '--adapters', 'nowhere']"
    program = f"import os, sys\n{change}\n{MAIN}"
    done = launch(n, several, tmp_path / "more" / "cache", program, port=10 * n)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    assert done.stdout.count("| pack |") == 1  # workers print nothing
    for name in ("pack", "losses.json", *(["plan.json"] if "%" in budget else ["merges.json"])):
        assert len({hash_tree(tmp_path / x / "run" / name) for x in ("one", "more")}) == 1


def test_bad_input_ends_all_ranks(paths, tmp_path):
    arguments = options(paths, tmp_path / "run", tasks=tmp_path / "missing")
    done = launch(2, arguments, tmp_path / "cache", port=60)
    assert "rank 0 exited with code 2" in done.stderr  # mlx.launch itself always returns 0
    assert "no such directory" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("import d2c_mlx, d2c_mlx.models.model as m; m._ENGINE = 'other'", "is not the base model"),
        ("import importlib.metadata as m; v = m.version\n    m.version = lambda name: '0.1' if name"
         " == 'mlx' else v(name)", "MLX: found 0.1, rank 0 has "),
    ],
)  # fmt: skip
def test_a_rank_with_another_model_or_that_computes_otherwise_is_named(
    paths, tmp_path, change, line
):
    program = f"import os\nif os.environ['MLX_RANK'] == '1':\n    {change}\n{MAIN}"
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=70)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    (problem,) = (x for x in text.splitlines() if x.startswith("error: "))
    assert problem.startswith("error: rank 1: ") and line in problem
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_ends_the_run(paths, tmp_path):
    """The ring backend returns what was in memory then, and waits for ever after that."""
    change = "if os.environ['MLX_RANK'] == '1': r._evaluate = lambda *_: os.kill(os.getpid(), 9)"
    program = f"import os, d2c_mlx, d2c_mlx.evaluate.distributed as r\n{change}\n{MAIN}"
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=100)
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "| pack |" not in text
    assert "Node with rank 1 exited with code -9" in text  # of mlx.launch
