"""The commands of a run and its stages. They import the library late, so that --help is instant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .execute import execute, log_to
from .help import Command
from .options import RUN_OPTIONS
from .paths import UserPath

_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="say what would be done and how long it takes, and stop"
)
_QUIET = click.option("-q", "--quiet", is_flag=True, help="no progress")
_LOG = click.option("--log-file", type=UserPath(path_type=str), metavar="FILE", help="append what"
                    " happens to it, with times")  # fmt: skip
_CONFIG = click.argument("config", required=False, type=UserPath(path_type=Path))
_INPUTS = "Adapters and tasks"
# Groups of options that the help of a stage shows; it takes the others, too.
_GROUPS = {
    "probe": (_INPUTS, "Evaluation"),
    "plan": (_INPUTS, "Budget", "Evaluation"),
    "cluster": (_INPUTS, "Budget", "Search", "Merge"),
    "merge": (_INPUTS, "Merge"),
    "refine": (_INPUTS, "Refine"),
    "pack": (_INPUTS, "Budget"),
    "bench": (_INPUTS, "Evaluation"),
    "report": (_INPUTS,),
}
_RESUMES = (
    "All other options of d2c-mlx run are taken, too."
    " Stages before it that are not done run first. With --output, and neither CONFIG nor"
    " --adapters, options that are not given are those of that run directory."
)


def _stage(about: Callable[[], None]) -> click.Command:
    """Make the command of a stage from a function without a body, by its name and docstring.

    The command takes the options of RunConfig, and an optional YAML file that they override.
    """
    name = about.__name__

    def command(
        config: Path | None,
        quiet: bool,
        as_json: bool,
        log_file: str | None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        if log_file:
            log_to(log_file)
        execute("report" if name == "run" else name, config, quiet, as_json, **options)

    for option in reversed((_CONFIG, *RUN_OPTIONS, _DRY_RUN, _QUIET, _LOG, _JSON)):
        command = option(command)
    epilog = None if name == "run" else _RESUMES
    made = click.command(name, cls=Command, help=about.__doc__, epilog=epilog)(command)
    if isinstance(made, Command):
        made.shown = _GROUPS.get(name)
    return made


@_stage
def run() -> None:
    """Convert, probe, cluster, merge, pack, bench and report in one go.

    CONFIG is a YAML file of options; an option on the command line overrides it.

    Examples:
      d2c-mlx run --adapters loras --tasks tasks --budget 25% --output runs/first
      d2c-mlx run config.yaml --budget 20MB
      d2c-mlx run --output runs/first          # continue, or repeat what changed
    """


@_stage
def probe() -> None:
    """Measure every adapter on the tasks' calibration rows.

    The losses go to losses.json.

    Example:
      d2c-mlx probe --adapters loras --tasks tasks --output runs/first
    """


@_stage
def plan() -> None:
    """Choose what to store for a budget in bytes.

    Clusters, rank and bits are chosen by measuring, into plan.json. From then on the options of the
    run directory include --plan auto.

    Example:
      d2c-mlx plan --output runs/first --budget 3%
    """


@_stage
def cluster() -> None:
    """Choose which adapters to merge.

    The clusters of D2C and of the baselines go to clusters.json. A budget in bytes is not planned
    then, but merged: from then on the options of the run directory include --plan d2c.

    Example:
      d2c-mlx cluster --output runs/first --budget 4 --json
    """


@_stage
def merge() -> None:
    """Merge each cluster into one adapter.

    The adapters go to merged/<k>/.

    Example:
      d2c-mlx merge --output runs/first --merge-method ties
    """


@_stage
def refine() -> None:
    """Train each merge, or adapter of a plan, to match its tasks' own.

    The adapters go to refined/. From then on the options of the run directory include --refine.

    Example:
      d2c-mlx refine --output runs/first --refine-steps 50
    """


@_stage
def pack() -> None:
    """Write what ships: adapters and a manifest.

    They go to pack/.

    Example:
      d2c-mlx pack --output runs/first --json
    """


@_stage
def bench() -> None:
    """Measure every method on held-out rows.

    The losses go to bench.json; without rows the errors of dW go to weights.json.

    A pack as on a phone is measured by d2c-mlx phone PACK.

    Example:
      d2c-mlx bench --output runs/first --test-examples 0
    """


@_stage
def report() -> None:
    """Write the results for people.

    They go to report.md and report.html.

    Example:
      d2c-mlx report --output runs/first
    """
