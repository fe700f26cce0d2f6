"""The command that checks this machine."""

from __future__ import annotations

import click

from .help import Command
from .say import say, say_json


@click.command(cls=Command)
@click.option("--tune", is_flag=True, help="measure how large passes through --model should be")
@click.option("--model", metavar="M", help="base model to tune for  [default: the embedded one]")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def doctor(tune: bool, model: str | None, as_json: bool) -> None:
    """Tell what this machine has and what is missing.

    With what to do about it; the exit code is 1 if something is missing. --tune takes some seconds
    and helps every later run; a first long run does it by itself.

    Example:
      d2c-mlx doctor --json
    """
    import dataclasses

    from d2c_mlx.run.doctor import diagnose, tune_for
    from d2c_mlx.utils.errors import ConfigError

    if model and not tune:
        raise ConfigError("--model: is for --tune, which was not given; add --tune")
    if tune:
        tune_for(model)
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
