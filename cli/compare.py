"""The command that compares merge methods and budgets in many runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .help import JSON, Command, UserPath
from .run import DRY_RUN, RUN_OPTIONS
from .say import minutes, say, say_json

if TYPE_CHECKING:
    from d2c_mlx.compare import Axes

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
@click.option(
    "--on",
    default="shared",
    metavar="LIST",
    help="shared: all methods merge the clusters of the first, or of --clusters; own: each its own",
)
@DRY_RUN
@JSON
def compare(
    configs: tuple[Path, ...],
    merge_methods: str,
    budgets: str,
    on: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Compare merge methods and budgets in one table.

    Each CONFIG, a YAML file of options, is run by every method at every budget; an option on the
    command line overrides all of them. A run has a directory in --output, as d2c-mlx run makes
    it, without baselines. Finished runs are not repeated.
    A budget in bytes is planned, once for all methods.

    The table goes to compare.md, .csv, .json and .svg: held-out losses, and the difference to the
    first method with its 95 % interval by a paired bootstrap over the rows.

    Example:
      d2c-mlx compare run.yaml --merge-methods linear,ties,tsv --budgets 2,3 --output runs/compare
    """
    from d2c_mlx.compare import Comparison

    given = {name: value for name, value in options.items() if value is not None}
    output = given.pop("output", None)
    axes = _axes(output, {"merge_methods": merge_methods, "budgets": budgets, "on": on})
    quiet = not sys.stderr.isatty()
    comparison = Comparison(configs or (None,), given, axes, Path(output or ""), quiet)
    left, entries = comparison.left, comparison.entries
    states = {entry.name: "to do" if entry in left else "done" for entry in entries}
    if dry_run and as_json:
        say_json({"runs": states, "seconds": round(comparison.seconds())})
    elif dry_run or not quiet:
        for name, state in states.items():
            say(f"{name:<40} {state}", err=not dry_run)
        text = f"{len(states)} runs, {len(left)} to do"
        say(f"{text}: about {minutes(comparison.seconds())} here", err=not dry_run)
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


def _axes(output: str | None, given: Mapping[str, str]) -> Axes:
    """The axes of the comparison by the texts of the options; raises ConfigError, all at once."""
    from d2c_mlx.compare import CLUSTERS, Axes
    from d2c_mlx.utils.errors import ConfigError

    problems = [] if output else ["output: not given; pass --output"]
    lists = {name: [part.strip() for part in text.split(",") if part.strip()]
             for name, text in given.items()}  # fmt: skip
    for name, parts in lists.items():
        if not parts or len(set(parts)) < len(parts):
            problems.append(f"{name}: found {given[name]!r}, expected a list without repeats")
    if not set(lists["on"]) <= set(CLUSTERS):
        problems.append(f"on: found {given['on']!r}, expected some of {list(CLUSTERS)}")
    if problems:
        raise ConfigError(problems)
    return Axes(*lists.values())
