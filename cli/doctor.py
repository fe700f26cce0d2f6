"""The command that checks this machine."""

from __future__ import annotations

import click

from .help import Command
from .say import say, say_json


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def doctor(as_json: bool) -> None:
    """Tell what this machine has and what is missing.

    With what to do about it; the exit code is 1 if something is missing.

    Example:
      d2c-mlx doctor --json
    """
    import dataclasses

    from d2c_mlx.run.doctor import diagnose

    findings = diagnose()
    if as_json:
        say_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            say(f"{'ok ' if finding.ok else '!! '} {finding.name:<12} {finding.value}")
            if finding.advice:
                say(f"    {'':<12} -> {finding.advice}")
    if not all(finding.ok for finding in findings):
        raise click.exceptions.Exit(1)
