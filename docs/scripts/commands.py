"""Write docs/reference/commands.md from the commands' own help.

python -m docs.scripts.commands       # or: make tables
"""

from __future__ import annotations

from pathlib import Path

import click
from d2c_mlx_cli.main import cli

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "commands.md"
# What `--help` shows at this width needs no scrolling on a page.
WIDTH = 86
HEAD = """\
# Commands
Written by `make tables` from `d2c-mlx COMMAND --help`. Every option of `run` but `--until` and \
`--dry-run` is also a key of the YAML file, with `_` for `-`; a list is one in YAML, or a text \
with commas. What is given on the command line overrides the file.
"""


def listed(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
    """Every command below a group, `(its words, the command)`, groups before their commands."""
    commands = []
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None:
            commands.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            commands += listed(command, f"{path} {name}")
    return commands


def page() -> str:
    """Text of the page: a heading and the help of every command."""
    parts = [HEAD]
    for words, command in [("d2c-mlx", cli), *listed(cli, "d2c-mlx")]:
        context = click.Context(command, info_name=words, terminal_width=WIDTH,
                                max_content_width=WIDTH, **cli.context_settings)  # fmt: skip
        parts.append(f"## {words}\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
