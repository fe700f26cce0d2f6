"""Every module of benchmarks/ is imported, and every script says how it is called."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

FILES = [path for path in sorted(ROOT.glob("benchmarks/**/*.py")) if path.name != "__init__.py"]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
SCRIPTS = [name for name, path in zip(MODULES, FILES) if "__main__" in path.read_text()]
# All in one process, because torch alone takes seconds to import.
CALLS = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    if hasattr(module, "main"):
        print(f"== {name}")
        sys.argv = [name, "--help"]
        try:
            module.main()
        except SystemExit as ended:
            assert ended.code == 0, name
        else:
            raise AssertionError(f"{name}: --help measured something")
"""


@pytest.fixture(scope="module")
def helps():
    """The words of `--help`, by module."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLS, *MODULES], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": ""},  # with torch
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r"^== (.*)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2]))


@pytest.mark.slow
def test_every_module_is_imported_and_every_script_has_help(helps):
    assert list(helps) == SCRIPTS and len(SCRIPTS) > 20
    for name, words in helps.items():
        called = name.removesuffix(".__main__")
        assert words.startswith("usage: ") and f"{called} " in words.replace("\n", " "), name


def written_commands():
    """`(file, module, options)` of every command `python -m benchmarks...` that is written down."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for path in [*pages, *FILES, ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"python -m (benchmarks[\w.]+)([^`\n]*)", text):
            yield path, name.rstrip("."), re.findall(r"(?<![\w-])--[\w-]+", rest)


@pytest.mark.slow
def test_commands_that_are_written_down_are_there(helps):
    found = list(written_commands())
    assert {name for _, name, _ in found} >= {name.removesuffix(".__main__") for name in SCRIPTS
                                              if not name.endswith("stock_loop")}  # fmt: skip
    for path, name, options in found:
        name = name if name in helps else f"{name}.__main__"
        assert name in helps, f"{path}: {name}"
        for option in options:
            assert option in helps[name], f"{path}: {name} {option}"


def test_no_other_way_of_calling_a_script_is_written_down():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for path in [*pages, *FILES, ROOT / "Makefile"]:
        others = set(re.findall(r"python (benchmarks/\S+)", path.read_text(encoding="utf-8")))
        assert others <= {"benchmarks/speed/stock_loop.py"}, path


def test_scripts_are_sorted_into_small_folders():
    for folder in {path.parent for path in FILES}:
        assert (folder / "README.md").is_file() or folder.name == "tasks"
        assert len([path for path in folder.glob("*") if path.is_file()]) <= 15, folder
