"""The `d2c-mlx` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import importlib
import sys
import warnings

import click

_COMMANDS = {
    "run": "stages:run",
    "convert": "formats:convert",
    "probe": "stages:probe",
    "plan": "stages:plan",
    "cluster": "stages:cluster",
    "merge": "stages:merge",
    "refine": "stages:refine",
    "pack": "stages:pack",
    "bench": "stages:bench",
    "report": "stages:report",
    "verify": "formats:verify",
    "list": "packs:list_",
    "add": "packs:add",
    "remove": "packs:remove",
    "route": "packs:route",
    "serve": "serve:serve",
    "phone": "phone:phone",
    "unpack": "formats:unpack",
    "export": "formats:export",
    "push": "hub:push",
    "doctor": "doctor:doctor",
}
# Forms of a command that take options of their own.
_FORMS = {"bench compare": "phone:compare"}


def _form(args: list[str]) -> tuple[str, list[str]]:
    """Which command these arguments ask for, and what is left for it."""
    name, *rest = args
    if name == "bench" and rest[:1] == ["compare"]:
        return "bench compare", rest[1:]
    # Its name before there was `phone`; no other form of `bench` has that option.
    if name == "bench" and any(arg.split("=")[0] == "--device" for arg in rest):
        click.echo("warning: `bench PACK --device` is now `d2c-mlx phone PACK --device`", err=True)
        return "phone", rest
    return name, rest


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = {**_COMMANDS, **_FORMS}.get(cmd_name)
        if place is None:
            return None
        module, name = place.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, rest = _form(args)
        _, command, rest = super().resolve_command(ctx, [name, *rest])
        return name, command, rest


@click.group(
    cls=_LazyGroup,
    epilog="Start with: d2c-mlx run --adapters DIR --tasks DIR --budget 5 --output runs/first",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="d2c-mlx")
def cli() -> None:
    """Fit many LoRA adapters into the room there is.

    Adapters, about ten examples per task and a budget go in; a verified pack comes out. Of a number
    of adapters ("5") stock mlx-lm loads it; of bytes ("3%") d2c-mlx unpack makes adapters that it
    does.
    """


_python_s_format = warnings.formatwarning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Warnings of input are a line without the place in the code; all others are Python's."""
    from d2c_mlx.utils.errors import InputWarning

    if issubclass(category, InputWarning):
        return f"warning: {message}\n"
    return _python_s_format(message, category, filename, lineno, line)


def main() -> None:
    """Run the command; input errors are one line each on standard error, never a traceback."""
    warnings.formatwarning = _format_warning
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
        from d2c_mlx.utils.errors import D2CError

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
