"""The real command on a tiny library."""

import shutil

import pytest
from helpers.command import NAMES, Command
from helpers.tiny import Library, library


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    library(root, NAMES)
    return root


@pytest.fixture
def lib(pristine, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(pristine, root)
    return Library(root / "model", root / "adapters", root / "tasks")


@pytest.fixture
def cli(lib, tmp_path, monkeypatch, command):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    return Command(lib, tmp_path, command)
