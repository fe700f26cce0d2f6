"""A run on a tiny model."""

import pytest
from helpers.runs import NAMES
from helpers.tiny import library

from d2c_mlx.run.config import RunConfig


@pytest.fixture
def config(tmp_path):
    """Four adapters, room for two. Paths are relative, as users write them."""
    paths = library(tmp_path, NAMES)
    return RunConfig(
        model=str(paths.model),
        adapters=str(paths.adapters),
        tasks=str(paths.tasks),
        budget="2",
        output=str(tmp_path / "run"),
        probe_examples=3,
        test_examples=3,
    )
