"""Printing, so that nothing in the output can steer the terminal.

The library is imported late, so that help is instant.
"""

import json
from typing import Any

import click


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """Print lines; other control characters, which a stranger's file may have, are escaped."""
    from d2c_mlx.utils.errors import printable

    click.echo(printable(text, "\n\t"), err=err, nl=nl)


def say_json(content: Any) -> None:  # noqa: ANN401  JSON is any
    """Print JSON, readable in any script but for what is not printable."""
    text = json.dumps(content, indent=2, ensure_ascii=False)

    def escaped(c: str) -> str:
        return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1]

    click.echo("".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text))


def minutes(seconds: float) -> str:
    """A time for people: seconds up to 90, then minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
