"""The public names: what `d2c_mlx` exports, its types and docs/reference/api.md agree."""

import ast
import importlib
import re

import pytest
from helpers import ROOT

import d2c_mlx

NAMES = d2c_mlx._NAMES


def test_a_name_is_the_object_of_its_module_and_says_what_it_is():
    """`make docs` makes its page of these words."""
    for name, (module, inner) in NAMES.items():
        value = getattr(d2c_mlx, name)
        assert value is getattr(importlib.import_module(f"d2c_mlx.{module}"), inner)
        assert len((value.__doc__ or "").split()) > 3
    with pytest.raises(AttributeError, match="module 'd2c_mlx' has no attribute 'nothing'"):
        _ = d2c_mlx.nothing


def test_all_lists_of_them_agree():
    """A type checker does not run `__getattr__`, so it reads the imports under TYPE_CHECKING."""
    assert sorted(d2c_mlx.__all__) == sorted([*NAMES, "__version__"])
    assert set(d2c_mlx.__all__) <= set(dir(d2c_mlx))
    tree = ast.parse((ROOT / "d2c_mlx" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert NAMES == {
        alias.asname or alias.name: (node.module.removeprefix("d2c_mlx."), alias.name)
        for node in block.body
        for alias in node.names
    }
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: d2c_mlx\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(NAMES) and "`__version__`" in text
    assert "](docs/reference/api.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
