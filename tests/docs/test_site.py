"""The documentation site: what is generated is up to date, and every command that is shown exists.

`make docs` builds it, with packages that are not installed here.
"""

import re
import shlex

import click
from d2c_mlx_cli.main import cli
from helpers import ROOT

from docs.scripts import commands, figures

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
