"""How commands show themselves: options in groups, commands in sections, words for what is gone."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

__all__ = ["Command", "Entry", "GroupedOption", "LazyGroup", "load"]


class GroupedOption(click.Option):
    """An option with the heading that the help shows it under."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:  # noqa: ANN401  click's
        super().__init__(*args, **attributes)
        self.group = group


class Command(click.Command):
    """A command whose help has its options by group, and that knows what it had once.

    Of the help, which is a docstring mostly, a paragraph of examples keeps its lines.
    """

    def __init__(self, name: str | None, help: str | None = None, **attributes: Any) -> None:  # noqa: ANN401  click's
        text = re.sub(r"\n\n(?=Examples?:)", "\n\n\b\n", inspect.cleandoc(help or ""))
        super().__init__(name, help=text, **attributes)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups in the order of their first options; those of none last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        rest = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, GroupedOption):
                groups.setdefault(param.group, []).append(record)
            elif record and isinstance(param, click.Option):
                rest.append(record)
        for name, records in [*groups.items(), ("Options", rest)]:
            with formatter.section(name):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; an option that is gone is told apart from one that never was."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from .removed import instead

            said = instead(self.name or "", error.option_name)
            if said:
                raise click.UsageError(said, ctx) from None
            raise


class Entry(NamedTuple):
    """A command as its parent knows it.

    Attributes:
        place: `module:name` in this package.
        section: heading that the parent's help shows it under.
        help: one sentence, the first of the command's own help.
    """

    place: str
    section: str
    help: str


class LazyGroup(click.Group):
    """A group whose commands are imported when they are named, and not for its own help."""

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **attributes: Any) -> None:  # noqa: ANN401  click's
        super().__init__(*args, **attributes)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, its module imported now."""
        entry = self.entries.get(cmd_name)
        return load(entry.place) if entry else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, by what the entries say."""
        width = max(map(len, self.entries))
        for section in dict.fromkeys(entry.section for entry in self.entries.values()):
            rows = [
                (name.ljust(width), entry.help)
                for name, entry in self.entries.items()
                if entry.section == section
            ]
            with formatter.section(section):
                formatter.write_dl(rows)


def load(place: str) -> click.Command:
    """The command at `module:name` of this package."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
