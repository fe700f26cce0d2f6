"""The command that compares merge methods and budgets in many runs."""

import sys
from pathlib import Path
from typing import Any

import click

from .help import JSON, Command, Printed, UserPath
from .run import RUN_OPTIONS


@click.command(cls=Command)
@click.argument("config", required=False, type=UserPath(path_type=Path))
@click.option(
    "--merge-methods",
    required=True,
    metavar="LIST",
    help="merge methods, with commas; the others are compared with the first",
)
@click.option("--budgets", required=True, metavar="LIST", help="budgets, with commas")
@JSON
def compare(
    config: Path | None,
    merge_methods: str,
    budgets: str,
    **options: Any,  # noqa: ANN401
) -> Printed:
    """Compare merge methods and budgets in one table.

    CONFIG, a YAML file of options, is run by every method at every budget; an option on the command
    line overrides it. A run has a directory in --output, as d2c-mlx run makes it, without
    baselines. Finished runs are not repeated. All methods merge the clusters of the first, or of
    --clusters. A budget in bytes is planned, once for all methods.

    The table goes to compare.md and compare.json: held-out losses, and the difference to the first
    method with its 95 % interval by a paired bootstrap over the rows.

    Example:
      d2c-mlx compare run.yaml --merge-methods linear,ties,tsv --budgets 2,3 --output runs/compare
    """
    from d2c_mlx.compare import compare_runs, render_runs
    from d2c_mlx.utils.errors import ConfigError

    given = {name: value for name, value in options.items() if value is not None}
    if not (output := given.pop("output", None)):
        raise ConfigError("output: not given; pass --output")
    methods, amounts = (
        [part.strip() for part in text.split(",") if part.strip()]
        for text in (merge_methods, budgets)
    )
    rows = compare_runs(config, given, methods, amounts, Path(output), not sys.stderr.isatty())
    return rows, [render_runs(rows).rstrip("\n")]


for _option in RUN_OPTIONS:
    _option(compare)
# A comparison sets the others itself.
_SET = {"merge_method", "budget", "format", "baselines"}
compare.params = [param for param in compare.params if param.name not in _SET]
