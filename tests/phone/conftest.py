"""One benchmark of a pack, for all tests that look at its results."""

import json

import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.phone import OPTIONS, make_pack
from helpers.tiny import library


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Paths, pack, and the one long run that most tests look at: its JSON."""
    root = tmp_path_factory.mktemp("phone")
    paths = library(root, ["a", "b", "c"])
    pack = make_pack(paths, root / "pack")
    result = CliRunner().invoke(
        cli, ["phone", str(pack.path), "--model", str(paths.model), "--bits", "4", "--device",
              "iphone-6gb", "--adapters", str(paths.adapters), "--tasks", str(paths.tasks),
              "--test-examples", "3", "--json", *OPTIONS],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return paths, pack, json.loads(result.stdout)
