"""Many runs in one table: every merge method at every budget, on the same clusters.

Each run has a directory of its own, as a single `d2c-mlx run` would make it. Runs share the cache
of losses; a finished run is not repeated.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.evaluate.heldout import paired_bootstrap
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import ConfigError, InputError, collect
from d2c_mlx.utils.files import write_json, write_text
from d2c_mlx.utils.progress import say
from d2c_mlx.utils.templates import percent, table


def compare_runs(
    config: Path | None,
    options: Mapping[str, object],
    methods: Sequence[str],
    budgets: Sequence[str],
    output: Path,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run every merge method at every budget -> `compare.json` and `compare.md`.

    Args:
        config: YAML file of options; None is no file.
        options: options that replace those of the file.
        methods: merge methods. The others are compared with the first, and merge the clusters of
            its run, or those that `clusters` names.
        budgets: texts of budgets; bytes are planned, once for all methods.
        output: directory of the runs and of the table.
        quiet: show no progress.

    Returns:
        The content of `compare.json`: a row for each run, see `render_runs`.

    Raises:
        InputError: every problem of the options, one line each, or of the inputs of a run.
        D2CError: a run failed; those before it are kept.
    """
    runs = _runs_of(config, options, methods, budgets, output)
    rows, first = [], dict[str, dict[str, np.ndarray]]()
    for i, (name, its) in enumerate(runs.items()):
        say(f"run {i + 1} of {len(runs)}: {name}", quiet)
        bench = run(its, quiet=quiet).read("bench.json")
        losses = {task: np.array(values) for task, values in bench["rows"].items()}
        theirs = first.setdefault(its.budget.text, losses)
        row = {
            "name": name,
            "budget": its.budget.text,
            "method": "plan" if its.budget.in_bytes else its.merge_method,
            "beside_first": None if theirs is losses else paired_bootstrap(losses, theirs),
        }
        rows.append({**row, **bench["methods"]["pack"]})
    write_json(output / "compare.json", rows)
    write_text(output / "compare.md", render_runs(rows))
    return rows


def _runs_of(
    config: Path | None,
    options: Mapping[str, object],
    methods: Sequence[str],
    budgets: Sequence[str],
    output: Path,
) -> dict[str, RunConfig]:
    """The options of each run, by the name of its directory; raises as `compare_runs`."""
    if any(name in os.environ for name in RANK_VARIABLES):
        raise ConfigError("compare: found an mlx.launch, expected one process; run it alone")
    errors: list[InputError] = []
    for name, values in (("merge_methods", methods), ("budgets", budgets)):
        if not values:
            errors.append(ConfigError(f"{name}: found none, expected a list with commas"))
    runs: dict[str, RunConfig] = {}
    lent: dict[str, str] = {}
    for budget, method in itertools.product(budgets, methods):
        given = {**options, "budget": budget, "merge_method": method, "output": str(output)}
        read = collect(errors, partial(load_config, config, given))
        if not read:
            continue
        if not read.tasks:
            line = "tasks: not given; compare judges on held-out rows: pass --tasks DIR"
            errors.append(ConfigError(line))
        planned = read.budget.in_bytes
        # The name of a plug-in may have any character.
        name = re.sub(r"[^\w.+%-]", "_", f"{'plan' if planned else method}-{budget}")
        runs[name] = read.replace(
            output=str(output / name),
            baselines=(),
            merge_method=None if planned else method,
            clusters=read.clusters or lent.get(budget),
        )
        if not planned:
            lent.setdefault(budget, f"{output / name}/clusters.json")
    if errors:  # each once: runs share most of theirs
        raise InputError(dict.fromkeys(line for error in errors for line in error.problems))
    return runs


def render_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a comparison as Markdown, the least excess first at every budget.

    Args:
        rows: content of `compare.json`: for each run its name, budget and method, the pack's part
            of `bench.json`, and `beside_first`, its difference to the first method as
            `paired_bootstrap` has it; None for the first.
    """
    budgets, cells = list(dict.fromkeys(row["budget"] for row in rows)), []
    for row in sorted(rows, key=lambda row: (budgets.index(row["budget"]), row["excess"])):
        pair, beside = row["beside_first"], ""
        if pair:
            # An interval needs two rows of every task.
            missing = pair["low"] is None
            between = "too few rows" if missing else f"{pair['low']:+.4f} to {pair['high']:+.4f}"
            beside = f"{pair['difference']:+.4f} ({between})"
        losses = [f"{row['loss']:.4f}", f"{row['excess']:.4f}", percent(row["kept"])]
        cells.append([row["budget"], row["method"], f"{row['nbytes']:,}", *losses, beside])
    head = ["budget", "method", "bytes", "loss", "excess", "kept", "beside the first method"]
    return (
        f"{table(head, cells, n_left=2)}\n\n"
        "Excess: nats per target token above the individual adapters, on held-out rows. Beside the"
        " first method: the loss less the one of the method that was named first, with its 95 %"
        " interval by a paired bootstrap over the rows; below 0 is better.\n"
    )
