"""Where tests are: in a folder per wing, and none imports another."""

import ast

from helpers import ROOT

TESTS = ROOT / "tests"
# Folders that are no wing of the package.
OTHERS = {"benchmarks", "cli", "corpus", "docs", "helpers", "robustness"}


def imported(path):
    """Names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_imports_another():
    for path in TESTS.rglob("*.py"):
        names = [part for name in imported(path) for part in name.split(".")]
        assert not [name for name in names if name.startswith("test_")], path


def test_a_folder_of_tests_is_a_wing():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__"}
    wings = {path.parent.name for path in (ROOT / "d2c_mlx").glob("*/__init__.py")}
    assert folders == wings | OTHERS
