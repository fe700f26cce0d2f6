"""Parts of commands: examples in the help, commands in sections, paths, what is printed."""

import importlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .say import say, say_json

# What a command returns: the content for `--json`, and lines for people.
Printed = tuple[Any, Sequence[str]]
JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
MODEL = click.option(
    "--model", metavar="M", help="the pack's base model  [default: the embedded one]"
)


class UserPath(click.Path):
    """`click.Path` with `~`, which a shell leaves as it is in `--output=~/x` and in scripts."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ANN401  as click has it
        """Expand `~` in a path, then check it as click does."""
        return super().convert(os.path.expanduser(value), param, ctx)


PATH = UserPath(path_type=Path)


class PackPath(UserPath):
    """The directory of a pack, or of the run that made it."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ANN401  as click has it
        """Put the pack in a run's place, then check it as click does."""
        # Not above: help must not import the library.
        from d2c_mlx.packs.pack import pack_directory

        return super().convert(pack_directory(os.fspath(value)), param, ctx)


class Command(click.Command):
    """A command in whose help a paragraph of examples keeps its lines.

    It prints what its function returns: the content for `--json`, else the lines; a number after
    them is the exit code. One that returns None has printed.
    """

    def __init__(self, name: str | None, help: str | None = None, **attributes: Any) -> None:  # noqa: ANN401  click's
        text = re.sub(r"\n\n(?=Examples?:)", "\n\n\b\n", inspect.cleandoc(help or ""))
        super().__init__(name, help=text, **attributes)

    def invoke(self, ctx: click.Context) -> None:
        """Run the function and print its result."""
        as_json = ctx.params.pop("as_json", False)
        if result := super().invoke(ctx):
            content, lines, *code = result
            say_json(content) if as_json else say("\n".join(lines))
            ctx.exit(*code)


class LazyGroup(click.Group):
    """A group in sections, which imports a command only when it runs, and none for its help."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401  click's
        sections: Mapping[str, Mapping[str, tuple[str, str]]],
        **attributes: Any,  # noqa: ANN401
    ) -> None:
        """Make a group of `sections`: heading -> command -> `module:name` here, and its help."""
        super().__init__(*args, **attributes)
        self.sections = sections
        # click proposes the closest of these names.
        self.commands: Any = {name: place for commands in sections.values()
                              for name, (place, _) in commands.items()}  # fmt: skip

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the help."""
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of a name; None if there is none."""
        if cmd_name not in self.commands:
            return None
        module, name = self.commands[cmd_name].split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, without importing commands."""
        width = max(map(len, self.commands))
        for section, commands in self.sections.items():
            with formatter.section(section):
                formatter.write_dl(
                    [(name.ljust(width), text) for name, (_, text) in commands.items()]
                )
