"""A library of four adapters on a tiny model, measured once for all tests of plans."""

import pytest
from helpers.tiny import library

from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The index of a layout as small takes a large share of a budget."""
    root = tmp_path_factory.mktemp("planned")
    paths = library(root, ["a", "b", "c", "d"])
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="60%", output=str(root / "run"), probe_examples=4, test_examples=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def session(config):
    """The run after its probe."""
    return run(config, until="probe", quiet=True)
