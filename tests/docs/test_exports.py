"""The public names: what `d2c_mlx` exports, its types and docs/reference/api.md agree."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import d2c_mlx

NAMES = d2c_mlx._NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_object_of_its_module(name):
    module, inner = NAMES[name]
    expected = getattr(importlib.import_module(f"d2c_mlx.{module}"), inner)
    assert getattr(d2c_mlx, name) is expected
    scope: dict = {}
    exec(f"from d2c_mlx import {name}", scope)
    assert scope[name] is expected


def test_all_names_and_the_version_are_listed():
    assert len(set(d2c_mlx.__all__)) == len(d2c_mlx.__all__)
    assert set(d2c_mlx.__all__) == {*NAMES, "__version__"}
    assert set(d2c_mlx.__all__) <= set(dir(d2c_mlx))


def test_a_type_checker_sees_the_same_names():
    """It does not run `__getattr__`, so it reads the imports under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "d2c_mlx" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname or alias.name: (node.module.removeprefix("d2c_mlx."), alias.name)
        for node in block.body
        for alias in node.names
    }
    assert seen == NAMES


def test_the_document_lists_exactly_these_names():
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: d2c_mlx\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(NAMES) and "`__version__`" in text
    assert "](docs/reference/api.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_says_what_it_is(name):
    """`make docs` makes its page of these words."""
    about = getattr(d2c_mlx, name).__doc__ or ""
    assert len(about.split()) > 3


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'd2c_mlx' has no attribute 'nothing'"):
        _ = d2c_mlx.nothing
    with pytest.raises(ImportError):
        exec("from d2c_mlx import nothing")


def test_the_package_alone_imports_nothing_heavy():
    """Nor does listing it."""
    code = "import sys, d2c_mlx; dir(d2c_mlx); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"mlx", "mlx_lm", "numpy", "pydantic"} & {
        name.split(".")[0] for name in done.stdout.split()
    }
