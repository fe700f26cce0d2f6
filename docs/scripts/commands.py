"""Write docs/reference/commands.md and topics.md from the commands' own help.

python -m docs.scripts.commands       # or: make options
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import click
from d2c_mlx_cli.help import GroupedOption
from d2c_mlx_cli.main import cli
from d2c_mlx_cli.topics import TOPICS

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
# What `--help` shows at this width needs no scrolling on a page.
WIDTH = 86
HEAD = """\
# Commands
Written by `make options` from `d2c-mlx COMMAND --help`. Options of a run, its stages and \
`phone` are in [tables](options.md), and left out here.
"""
TOPICS_HEAD = """\
# Environment, exit codes, completion, rows
Written by `make options` from `d2c-mlx help TOPIC`.
"""


def listed(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
    """Every command below a group, `(its words, the command)`, groups before their commands."""
    found = []
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += listed(command, f"{path} {name}")
    return found


def without_shared(command: click.Command) -> click.Command:
    """The same command, but for options that have a group: those are in the tables of options."""
    short = copy(command)
    short.params = [one for one in command.params if not isinstance(one, GroupedOption)]
    return short


def page() -> str:
    """Text of the page: a heading and the help of every command."""
    parts = [HEAD]
    for words, command in [("d2c-mlx", cli), *listed(cli, "d2c-mlx")]:
        command = without_shared(command)
        context = click.Context(command, info_name=words, terminal_width=WIDTH,
                                max_content_width=WIDTH, **cli.context_settings)  # fmt: skip
        parts.append(f"## {words}\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def topics() -> str:
    """Text of the page of what belongs to no single command."""
    parts = [f"## d2c-mlx help {name}\n```text\n{text}\n```\n" for name, text in TOPICS.items()]
    return "\n".join([TOPICS_HEAD, *parts])


def pages() -> dict[Path, str]:
    """The pages and their texts."""
    return {FOLDER / "commands.md": page(), FOLDER / "topics.md": topics()}


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
