"""Fixtures for tests of plans."""

import pytest
from helpers.tiny import library

from d2c_mlx.run.config import RunConfig


@pytest.fixture
def config(tmp_path):
    """Four adapters on a tiny model, whose layout's index takes a large share of a budget."""
    paths = library(tmp_path, ["a", "b", "c", "d"])
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="60%", output=str(tmp_path / "run"), probe_examples=3,
        test_examples=2,     )  # fmt: skip
