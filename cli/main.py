"""The `d2c-mlx` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import importlib
import sys

import click

_COMMANDS = {
    "run": "commands:run",
    "convert": "commands:convert",
    "probe": "commands:probe",
    "plan": "commands:plan",
    "cluster": "commands:cluster",
    "merge": "commands:merge",
    "refine": "commands:refine",
    "pack": "commands:pack",
    "bench": "commands:bench",
    "report": "commands:report",
    "verify": "commands:verify",
    "unpack": "commands:unpack",
    "export": "commands:export",
    "doctor": "commands:doctor",
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name].split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)


@click.group(
    cls=_LazyGroup,
    epilog="Start with: d2c-mlx run --adapters DIR --tasks DIR --budget 25% --output runs/first",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="d2c-mlx")
def cli() -> None:
    """Merge many LoRA adapters into the few that fit.

    Adapters, about ten examples per task and a budget go in; a verified pack that stock mlx-lm
    loads comes out.
    """


def main() -> None:
    """Run the command; input errors are one line each on standard error, never a traceback."""
    try:
        # Without standalone mode click returns the exit code of an Exit instead of raising it.
        sys.exit(cli(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except Exception as error:
        # errors.py is the only part of the library that is light enough to import here.
        from d2c_mlx.errors import D2CError

        if isinstance(error, OSError) and error.strerror:
            # A full disk, a directory that may not be written: nothing that a traceback explains.
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror}", err=True)
            sys.exit(1)
        if not isinstance(error, D2CError):
            raise
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        sys.exit(error.exit_code)
