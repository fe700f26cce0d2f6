"""A library of four adapters on a tiny model, measured once for all tests of plans."""

import pytest
from helpers.runs import config_of
from helpers.tiny import library

from d2c_mlx.pipeline import run


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The index of a layout as small takes a large share of a budget."""
    root = tmp_path_factory.mktemp("planned")
    paths = library(root, ["a", "b", "c", "d"])
    return config_of(paths, root / "run", budget="60%", probe_examples=4)


@pytest.fixture(scope="session")
def session(config):
    """The run after its probe."""
    return run(config, until="probe", quiet=True)
