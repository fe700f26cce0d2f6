"""The command that compares merge methods and budgets in many runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .help import JSON, Command, UserPath
from .run import DRY_RUN, RUN_OPTIONS
from .say import minutes, say, say_json

# Options of a run that a comparison sets itself.
_SET = {"merge_method", "budget", "format", "baselines"}


@click.command(cls=Command)
@click.argument("configs", metavar="[CONFIG]...", nargs=-1, type=UserPath(path_type=Path))
@click.option(
    "--merge-methods",
    required=True,
    metavar="LIST",
    help="merge methods, with commas; the others are compared with the first",
)
@click.option("--budgets", required=True, metavar="LIST", help="budgets, with commas")
@DRY_RUN
@JSON
def compare(
    configs: tuple[Path, ...],
    merge_methods: str,
    budgets: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Compare merge methods and budgets in one table.

    Each CONFIG, a YAML file of options, is run by every method at every budget; an option on the
    command line overrides all of them. A run has a directory in --output, as d2c-mlx run makes
    it, without baselines. Finished runs are not repeated.
    All methods merge the clusters of the first, or of --clusters. A budget in bytes is planned,
    once for all methods.

    The table goes to compare.md and compare.json: held-out losses, and the difference to the first
    method with its 95 % interval by a paired bootstrap over the rows.

    Example:
      d2c-mlx compare run.yaml --merge-methods linear,ties,tsv --budgets 2,3 --output runs/compare
    """
    from d2c_mlx.compare import Comparison
    from d2c_mlx.utils.errors import ConfigError

    given = {name: value for name, value in options.items() if value is not None}
    output, quiet = given.pop("output", None), not sys.stderr.isatty()
    if not output:
        raise ConfigError("output: not given; pass --output")
    methods, amounts = (
        [part.strip() for part in text.split(",") if part.strip()]
        for text in (merge_methods, budgets)
    )
    comparison = Comparison(configs or (None,), given, methods, amounts, Path(output), quiet)
    left, entries = comparison.left, comparison.entries
    states = {entry.name: "to do" if entry in left else "done" for entry in entries}
    if dry_run and as_json:
        say_json({"runs": states, "seconds": round(comparison.seconds())})
    elif dry_run:
        for name, state in states.items():
            say(f"{name:<40} {state}")
        text = f"{len(states)} runs, {len(left)} to do"
        say(f"{text}: about {minutes(comparison.seconds())} here")
    if dry_run:
        return
    content = comparison.run()
    if as_json:
        say_json(content)
    else:
        say((comparison.output / "compare.md").read_text(encoding="utf-8"), nl=False)


for _option in RUN_OPTIONS:
    _option(compare)
compare.params = [param for param in compare.params if param.name not in _SET]
