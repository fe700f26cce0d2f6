"""Parts of commands: options in groups, commands in sections, paths, `--json`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

__all__ = ["JSON", "MODEL", "Command", "Entry", "GroupedOption", "LazyGroup", "PackPath",
           "UserPath"]  # fmt: skip

JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
MODEL = click.option(
    "--model", metavar="M", help="the pack's base model  [default: the embedded one]"
)


class UserPath(click.Path):
    """`click.Path` with `~`, which a shell leaves as it is in `--output=~/x` and in scripts."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401  as click has it
        """Expand `~` in a path, then check it as click does."""
        return super().convert(os.path.expanduser(value), param, ctx)


class PackPath(UserPath):
    """The directory of a pack, or of the run that made it."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401  as click has it
        """Put the pack in a run's place, then check it as click does."""
        # Not above: help must not import the library.
        from d2c_mlx.packs.pack import pack_directory

        return super().convert(pack_directory(os.fspath(value)), param, ctx)


class GroupedOption(click.Option):
    """An option that the help shows under the heading `group`."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:  # noqa: ANN401  click's
        super().__init__(*args, **attributes)
        self.group = group


class Command(click.Command):
    """A command with its options in groups; in its help a paragraph of examples keeps its lines."""

    def __init__(self, name: str | None, help: str | None = None, **attributes: Any) -> None:  # noqa: ANN401  click's
        text = re.sub(r"\n\n(?=Examples?:)", "\n\n\b\n", inspect.cleandoc(help or ""))
        super().__init__(name, help=text, **attributes)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups in the order of their first options, and options without one last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        others = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, GroupedOption):
                groups.setdefault(param.group, []).append(record)
            elif record and isinstance(param, click.Option):
                others.append(record)
        for name, records in [*groups.items(), ("Options", others)]:
            with formatter.section(name):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; a pattern that a shell made many words gets a message of its own."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if "unexpected extra argument" in error.message and "--adapters" in given:
                raise click.UsageError(
                    f"{error.message}; a pattern such as --adapters loras/* is many words: give the"
                    " folder, --adapters loras"
                ) from None
            raise


class Entry(NamedTuple):
    """An entry for a command in the help of its group.

    Attributes:
        place: `module:name` in this package.
        section: heading in the group's help.
        help: the first sentence of the command's own help.
    """

    place: str
    section: str
    help: str


class LazyGroup(click.Group):
    """A group that imports a command only when it runs, and none for its own help."""

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **attributes: Any) -> None:  # noqa: ANN401  click's
        super().__init__(*args, **attributes)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the help."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of a name; None if there is none."""
        if cmd_name not in self.entries:
            return None
        module, name = self.entries[cmd_name].place.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command as click does; the message for a name that is none proposes one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if close := difflib.get_close_matches(args[0], self.entries, 1):
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections from the entries, without importing commands."""
        width = max(map(len, self.entries))
        for section in dict.fromkeys(entry.section for entry in self.entries.values()):
            rows = [
                (name.ljust(width), entry.help)
                for name, entry in self.entries.items()
                if entry.section == section
            ]
            with formatter.section(section):
                formatter.write_dl(rows)
