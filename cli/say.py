"""Printing, so that nothing in the output can steer the terminal.

The library is imported late, so that help is instant.
"""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

__all__ = ["minutes", "say", "say_json", "warn_of_idle"]


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """Print lines; other control characters, which a stranger's file may have, are escaped."""
    from d2c_mlx.utils.errors import printable

    click.echo(printable(text, "\n\t"), err=err, nl=nl)


def warn_of_idle(why: str, *options: str) -> None:
    """Warn about those of some options that were given, `why` they do nothing."""
    from d2c_mlx.utils.errors import warn

    ctx = click.get_current_context()
    for param in ctx.command.params:
        name, option = str(param.name), param.opts[0]
        if option in options and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            warn(f"{option}: {ctx.params[name]!r} does nothing {why}")


def say_json(content: Any) -> None:  # noqa: ANN401  JSON is any
    """Print JSON, readable in any script but for what is not printable."""
    text = json.dumps(content, indent=2, ensure_ascii=False)

    def escaped(c: str) -> str:
        return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1]

    click.echo("".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text))


def minutes(seconds: float) -> str:
    """A time for people: seconds up to 90, then minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
