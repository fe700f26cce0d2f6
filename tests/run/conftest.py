"""A run on a tiny model."""

import pytest
from helpers.runs import NAMES, config_of
from helpers.tiny import library


@pytest.fixture
def config(tmp_path):
    """Four adapters, room for two. Paths are relative, as users write them."""
    paths = library(tmp_path, NAMES)
    return config_of(paths, tmp_path / "run", test_examples=3)
