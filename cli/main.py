"""The `d2c-mlx` command. Nothing heavy is imported before a command runs."""

import os
import re
import sys
import warnings

import click

from .help import LazyGroup

# Sections of commands, each with its place and first sentence, so that help imports none of them.
SECTIONS = {
    "Runs": {
        "init": ("start:init", "Look at a folder of adapters and write what a first run needs."),
        "run": ("run:run", "Convert, probe, cluster, merge, pack, bench and report in one go."),
        "compare": ("compare:compare", "Compare merge methods and budgets in one table."),
    },
    "Packs": {
        "list": ("packs:list_", "Show the adapters of a pack and the tasks they serve."),
        "add": ("packs:add", "Add an adapter to a pack, within its budget."),
        "remove": ("packs:remove", "Remove tasks from a pack."),
        "route": ("packs:route", "Say which task of a pack each prompt belongs to."),
        "generate": ("serve:generate", "Answer a prompt with the adapter of a task."),
        "serve": ("serve:serve", "Serve a pack behind OpenAI's API."),
        "phone": ("phone:phone", "Measure a pack on a quantized model, as on a phone."),
        "verify": ("packs:verify", "Check a pack against its manifest."),
        "export": ("packs:export", "Write the adapters of a pack for other programs."),
        "fuse": ("packs:fuse", "Bake one task of a pack into the base model."),
        "push": ("packs:push", "Upload a pack with a model card to the Hugging Face hub."),
    },
    "Adapters and machine": {
        "compose": ("adapters:compose", "Make an adapter for a new task from adapters you have."),
        "convert": ("adapters:convert", "Convert adapters to MLX or PEFT, exactly."),
        "doctor": ("start:doctor", "Show what this machine has and what is missing."),
    },
}


@click.group(
    cls=LazyGroup,
    sections=SECTIONS,
    epilog="Start with: d2c-mlx run --adapters DIR --tasks DIR --budget 5 --output runs/first",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(None, "-V", "--version", package_name="d2c-mlx", prog_name="d2c-mlx")
def cli() -> None:
    """Merge and compress many LoRA adapters to fit a storage budget.

    Adapters, about ten examples per task and a budget go in; a verified pack comes out. Stock
    mlx-lm loads a pack of so many adapters ("5") as it is, and one of so many bytes ("3%") after
    d2c-mlx export --to mlx.
    """


def main() -> None:
    """Run the command; errors are one line each on standard error, never a traceback.

    With D2C_MLX_DEBUG=1 an error that nobody expected shows one.
    """
    # A file with the number of a standard stream that is closed misleads MLX.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        # Without standalone mode click returns the exit code of an Exit instead of raising it. The
        # name is that of `python -m d2c_mlx` too.
        sys.exit(cli(standalone_mode=False, prog_name="d2c-mlx") or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except Exception as error:
        from d2c_mlx.utils.errors import D2CError

        from .say import say

        code, text = 1, (str(error).strip() or "it says no more").splitlines()[0]
        if isinstance(error, click.ClickException):
            code, text = 2, re.sub(r"\s*\n\s*", " ", error.format_message()).rstrip(".")
            if ctx := getattr(error, "ctx", None):
                text += f"; see {ctx.command_path} --help"
        elif isinstance(error, D2CError):
            code, text = error.exit_code, str(error)
        elif isinstance(error, OSError) and error.strerror:
            # A traceback explains no full disk, nor what may not be written; nor a temporary name.
            name = re.sub(r"\.([^/]+)\.[0-9a-f]{8}\.tmp", r"\1", str(error.filename or ""))
            text = f"{name}: {error.strerror}" if name else error.strerror
        elif os.environ.get("D2C_MLX_DEBUG") == "1":
            raise
        # MLX has no class for it.
        elif isinstance(error, MemoryError) or "Unable to allocate" in text:
            text = f"the memory does not suffice ({text}); give more, or set D2C_MLX_MEMORY_LIMIT"
        else:
            text = f"unexpected {type(error).__name__}: {text}"
            text += "; set D2C_MLX_DEBUG=1 to see where, and tell the authors"
        for line in text.splitlines():
            say(f"error: {line}", err=True)
        sys.exit(code)
