"""The `d2c-mlx` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import re
import resource
import sys
import warnings

import click

from .help import Entry, LazyGroup
from .interrupt import interrupts_told

_RUNS, _PACKS, _OTHER = "Runs", "Packs", "Adapters and machine"
# Each command with its place, section and first sentence, so that help imports none of them.
_COMMANDS = {
    "init": Entry(
        "start:init", _RUNS, "Look at a folder of adapters and write what a first run needs."
    ),
    "tasks": Entry("start:tasks", _RUNS, "Make the rows of a task."),
    "run": Entry(
        "run:run", _RUNS, "Convert, probe, cluster, merge, pack, bench and report in one go."
    ),
    "compare": Entry("compare:compare", _RUNS, "Compare merge methods and budgets in one table."),
    "list": Entry("packs:list_", _PACKS, "Show the adapters of a pack and the tasks they serve."),
    "add": Entry("packs:add", _PACKS, "Add an adapter to a pack, within its budget."),
    "remove": Entry("packs:remove", _PACKS, "Remove tasks from a pack."),
    "route": Entry("packs:route", _PACKS, "Tell which task of a pack each prompt is of."),
    "generate": Entry("generate:generate", _PACKS, "Answer a prompt with the adapter of a task."),
    "serve": Entry("serve:serve", _PACKS, "Serve a pack behind OpenAI's API."),
    "phone": Entry("phone:phone", _PACKS, "Measure a pack on a quantized model, as on a phone."),
    "verify": Entry("formats:verify", _PACKS, "Check a pack against its manifest."),
    "export": Entry("formats:export", _PACKS, "Write the adapters of a pack for other programs."),
    "push": Entry("hub:push", _PACKS, "Upload a pack with a model card to the Hugging Face hub."),
    "compose": Entry(
        "compose:compose", _OTHER, "Make an adapter for a new task of those that there are."
    ),
    "convert": Entry("formats:convert", _OTHER, "Convert adapters to MLX or PEFT, exactly."),
    "doctor": Entry("doctor:doctor", _OTHER, "Tell what this machine has and what is missing."),
}


@click.group(
    cls=LazyGroup,
    entries=_COMMANDS,
    epilog="Start with: d2c-mlx run --adapters DIR --tasks DIR --budget 5 --output runs/first",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(None, "-V", "--version", package_name="d2c-mlx", prog_name="d2c-mlx")
def cli() -> None:
    """Merge and compress many LoRA adapters to fit a storage budget.

    Adapters, about ten examples per task and a budget go in; a verified pack comes out. Stock
    mlx-lm loads a pack of so many adapters ("5") as it is, and one of so many bytes ("3%") after
    d2c-mlx export --to mlx.
    """


_python_s_format = warnings.formatwarning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format an `InputWarning` as one line without its place in the code; others as Python does."""
    from d2c_mlx.utils.errors import InputWarning, printable

    if issubclass(category, InputWarning):
        return f"warning: {printable(str(message))}\n"
    return _python_s_format(message, category, filename, lineno, line)


def _error(line: str) -> None:
    from .say import say

    say(f"error: {line}", err=True)


def _misuse(error: click.ClickException) -> str:
    """One line about what click could not read, and which help says what it reads."""
    said = re.sub(r"\s*\n\s*", " ", error.format_message()).rstrip(".")
    ctx = getattr(error, "ctx", None)
    joint = " See" if said.endswith("?") else "; see"
    return f"{said}{joint} {ctx.command_path} --help" if ctx else said


def _unexpected(error: Exception) -> str:
    """One line about an error that is no input's."""
    text = (str(error).strip() or "it says no more").splitlines()[0]
    memory = isinstance(error, MemoryError) or "allocate" in text or "bad_alloc" in text
    if memory:
        return f"the memory does not suffice ({text}); give more, or set D2C_MLX_MEMORY_LIMIT"
    return (
        f"unexpected {type(error).__name__}: {text}; set D2C_MLX_DEBUG=1 to see where, and tell"
        " the authors"
    )


def _open_streams() -> None:
    """Open standard streams that are closed: a file with one of their numbers misleads MLX."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)


def _little_memory() -> str | None:
    """One line if `ulimit -v` leaves too little: OpenBLAS would wait without an end, or crash."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    least = (2 << 30) + (os.cpu_count() or 1) * (64 << 20)
    if limit == resource.RLIM_INFINITY or limit >= least:
        return None
    return (
        f"ulimit -v: found {limit:,} bytes of addresses, expected at least {least:,}; raise it, or"
        " limit the memory of the container instead"
    )


def main() -> None:
    """Run the command; errors are one line each on standard error, never a traceback.

    With D2C_MLX_DEBUG=1 an error that nobody expected shows one.
    """
    _open_streams()
    if problem := _little_memory():
        # Not by `say`, which imports the library and so OpenBLAS.
        click.echo(f"error: {problem}", err=True)
        sys.exit(1)
    warnings.formatwarning = _format_warning
    try:
        # Without standalone mode click returns the exit code of an Exit instead of raising it. The
        # name is that of `python -m d2c_mlx` too.
        with interrupts_told():
            sys.exit(cli(standalone_mode=False, prog_name="d2c-mlx") or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _error(_misuse(error))
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except Exception as error:
        # errors.py is the only part of the library that is light enough to import here.
        from d2c_mlx.utils.errors import D2CError

        if isinstance(error, OSError) and error.strerror:
            # A traceback explains neither a full disk nor a directory that may not be written.
            where = f"{error.filename}: " if error.filename else ""
            _error(f"{where}{error.strerror}")
            sys.exit(1)
        if not isinstance(error, D2CError):
            if os.environ.get("D2C_MLX_DEBUG") == "1":
                raise
            _error(_unexpected(error))
            sys.exit(1)
        for line in str(error).splitlines():
            _error(line)
        sys.exit(error.exit_code)
