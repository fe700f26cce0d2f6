"""The documentation site: generated pages, commands and public names are those of the program.

`make docs` builds it, with packages that are not installed here.
"""

import ast
import importlib
import re
import shlex

import click
import pytest
from d2c_mlx_cli.main import cli
from helpers import ROOT

import d2c_mlx
from docs.scripts import commands, figures

NAMES = d2c_mlx._NAMES
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAVIGATION = (ROOT / "zensical.toml").read_text(encoding="utf-8")


def test_figures_and_commands_are_what_scripts_write():
    """Else run `make tables`."""
    drawn = {path.name: path.read_text(encoding="utf-8") for path in figures.FOLDER.iterdir()}
    assert drawn == {name: draw() for name, draw in figures.FIGURES.items()}
    assert commands.PAGE.read_text(encoding="utf-8") == commands.page()


def test_the_navigation_has_every_page_and_the_readme_is_short():
    listed = {
        name for name in re.findall(r'"([\w/-]+\.md)"', NAVIGATION) if "benchmarks" not in name
    }
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 800


def shown(page):
    """The `d2c-mlx` commands in a page's blocks, each as its words."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if match := re.search(r"(?:^|-- |^\$ )(d2c-mlx .*)", line):
                yield shlex.split(match[1].replace(" ...", ""), comments=True)[1:]


def test_commands_that_are_shown_exist():
    """With every option; values are not looked at."""
    context = click.Context(cli, info_name="d2c-mlx")
    for words in (words for page in PAGES for words in shown(page)):
        _, command, rest = cli.resolve_command(context, words)
        while isinstance(command, click.Group):
            _, command, rest = command.resolve_command(context, rest)
        command.make_parser(click.Context(command)).parse_args(rest)


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
