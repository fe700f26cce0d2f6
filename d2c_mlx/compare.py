"""Many runs in one table: merge methods and budgets, on shared clusters and on each method's own.

Each run has a directory of its own, as a single `d2c-mlx run` would make it. Runs share the model,
the adapters and rows in memory and the cache of losses; a finished run is not repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.evaluate.heldout import paired_bootstrap, row_losses
from d2c_mlx.forecast import forecast
from d2c_mlx.packs.overwrite import MARKER, read_marker, write_marker
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.report.comparison import render_csv, render_plot, render_runs
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.run.inputs import Inputs, read_clusters, read_inputs
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import ConfigError, InputError, collect
from d2c_mlx.utils.files import write_json, write_text
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.progress import say

__all__ = ["CLUSTERS", "Axes", "Comparison", "Entry"]

# Clusters that are merged: those of the first method, or each method's own.
CLUSTERS = ("shared", "own")
# Options of a comparison's runs that are not asked for: they take time and are not compared.
_UNASKED: dict[str, Any] = {"baselines": ()}
# Files of a comparison, beside the directories of its runs.
_WRITES = ("compare.json", "compare.md", "compare.csv", "compare.svg", "rows")


@dataclass(frozen=True)
class Axes:
    """What is compared: every method at every budget, on the clusters of every kind.

    Attributes:
        methods: merge methods; the others are compared with the first.
        budgets: texts of budgets; numbers of adapters.
        clusters: some of `CLUSTERS`.
    """

    methods: Sequence[str]
    budgets: Sequence[str]
    clusters: Sequence[str] = ("shared",)


@dataclass(frozen=True)
class Entry:
    """One run of a comparison.

    Attributes:
        name: its directory, below that of the comparison.
        source: name of the config; "" for options without a file.
        clusters: the kinds of clusters that it counts for.
        config: its options.
    """

    name: str
    source: str
    clusters: Sequence[str]
    config: RunConfig

    @property
    def run(self) -> Run:
        """The run, to look into."""
        return Run(self.config)

    @property
    def finished(self) -> bool:
        """True if the run is done and its inputs did not change since."""
        return self.run.finished()


class Comparison:
    """The runs of a comparison: make one, look at `left` and `seconds`, then `run`.

    Attributes:
        output: directory of the runs and of the table.
        entries: the runs, in their order.
        left: those that are not done.
        quiet: show no progress.
    """

    def __init__(
        self, configs: Sequence[Path | None], options: Mapping[str, object], axes: Axes,
        output: Path, quiet: bool = False,
    ) -> None:  # fmt: skip
        """Read all configs and check all inputs; nothing is written.

        Args:
            configs: YAML files of options; None is no file.
            options: options that replace those of the files.
            axes: what is compared.
            output: the directory.
            quiet: show no progress.

        Raises:
            InputError: every problem of every run, one line each.
        """
        self.output, self.quiet = output, quiet
        if any(name in os.environ for name in RANK_VARIABLES):
            raise ConfigError("compare: found an mlx.launch, expected one process; run it alone")
        errors: list[InputError] = []
        collect(errors, partial(_check_output, output))
        self.entries = _entries(configs, options, axes, output, errors)
        if not all(one.config.tasks for one in self.entries):
            errors.append(
                ConfigError("tasks: not given; compare judges on held-out rows: pass --tasks DIR")
            )
        _raise(errors)
        self._inputs: dict[str, Inputs] = {}
        self.left = [one for one in self.entries if not one.finished or self._rows(one) is None]
        self._check(errors)
        _raise(errors)

    def _check(self, errors: list[InputError]) -> None:
        """Load the inputs of every config with something to do, and check each of its runs."""
        tried, made = set(), {f"{one.config.output}/clusters.json" for one in self.entries}
        for entry in self.left:
            # What cannot be loaded at a budget cannot with another method either.
            key = entry.source, entry.config.budget.text
            if key in tried and entry.source not in self._inputs:
                continue
            tried.add(key)
            inputs = collect(errors, partial(self._inputs_of, entry))
            file = entry.config.clusters
            # Clusters of another run of this comparison are not there yet.
            if inputs and file and file not in made:
                names, k = inputs.library.names, inputs.capacity.n_clusters
                collect(errors, partial(read_clusters, Path(file), names, k))

    def _inputs_of(self, entry: Entry) -> Inputs:
        """Inputs of a run, which share what was loaded for the first run of its config."""
        if entry.source not in self._inputs:
            # Clusters of another run of this comparison are not there yet.
            self._inputs[entry.source] = read_inputs(entry.config.replace(clusters=None))
        return self._inputs[entry.source].of(entry.config)

    def seconds(self) -> float:
        """About how long the runs that are not done take here; see `forecast`."""
        total = 0.0
        for source in sorted({one.source for one in self.left}):
            of = [one for one in self.entries if one.source == source]
            left = [one for one in of if one in self.left]
            # As if nothing were done; then probe and the answers to prompts are shared by all,
            # cluster by those on given ones.
            new = left[0].config.replace(output=str(self.output / ".new"), clusters=None)
            each = {one.name: one.seconds for one in
                    forecast(new, inputs=self._inputs_of(left[0]).of(new)).stages}  # fmt: skip
            shared, cluster = each.pop("probe") + each.pop("answer", 0.0), each.get("cluster", 0.0)
            total += shared if left == of else 0.0
            total += sum(sum(each.values()) - bool(one.config.clusters) * cluster for one in left)
        return total

    def run(self) -> dict[str, Any]:
        """Do what is not done -> `compare.json`, `.md`, `.csv`, `.svg` and `rows/`.

        Returns:
            The content of `compare.json`.

        Raises:
            D2CError: a run failed; those before it are kept.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        write_marker(self.output, "compare", dict.fromkeys(_WRITES))
        rows = {}
        for i, entry in enumerate(self.entries):
            found = self._rows(entry) if entry.finished else None
            done = "" if found is None else ", done"
            say(f"run {i + 1} of {len(self.entries)}: {entry.name}{done}", self.quiet)
            rows[entry.name] = self._measure(entry) if found is None else found
        runs = [_row(one, kind) for one in self.entries for kind in one.clusters]
        content = {"runs": runs, "pairs": _pairs(runs, rows)}
        write_json(self.output / "compare.json", content)
        write_text(self.output / "compare.md", render_runs(content))
        write_text(self.output / "compare.csv", render_csv(content))
        write_text(self.output / "compare.svg", render_plot(content))
        return content

    def _measure(self, entry: Entry) -> dict[str, np.ndarray]:
        """Run an entry and measure its pack on single held-out rows -> `rows/<name>.json`."""
        finished = run(entry.config, quiet=self.quiet, inputs=self._inputs_of(entry))
        pack, library = load_pack(finished.path("pack")), finished.library
        tests = library.held_out
        serves = {test.task: pack.load(test.task) for test in tests}
        found = row_losses(library.scorer, serves, tests)
        rows = {task: losses.tolist() for task, losses in found.items()}
        write_json(self._rows_file(entry), {"of": _measured(entry), "rows": rows})
        return found

    def _rows_file(self, entry: Entry) -> Path:
        return self.output / "rows" / f"{entry.name}.json"

    def _rows(self, entry: Entry) -> dict[str, np.ndarray] | None:
        """The losses of rows that were measured on this very pack and these rows, or None."""
        found = json_or_none(self._rows_file(entry))
        if not isinstance(found, dict) or found.get("of") != _measured(entry):
            return None  # of an older pack, or damaged
        return {task: np.array(rows) for task, rows in found["rows"].items()}


def _raise(errors: Sequence[InputError]) -> None:
    """Raise the problems of all errors, each once: runs of one config share most of theirs."""
    if errors:
        raise InputError(dict.fromkeys(line for error in errors for line in error.problems))


def _check_output(output: Path) -> None:
    marker = read_marker(output)
    if marker and marker.kind == "compare":
        return
    mine = [name for name in (MARKER, *_WRITES) if (output / name).exists()]
    if mine:
        raise ConfigError(
            f"output: {output} holds {', '.join(mine)}, which no comparison wrote; give another"
            " --output"
        )


def _entries(
    configs: Sequence[Path | None], options: Mapping[str, object], axes: Axes, output: Path,
    errors: list[InputError],
) -> list[Entry]:  # fmt: skip
    """Every run, each once; the first method's own clusters are those that the others share."""
    stems = [config.stem if config else "" for config in configs]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        errors.append(ConfigError(f"CONFIG: several are called {', '.join(twice)}; rename some"))
    found: list[Entry] = []
    for stem, path, budget in (
        (*one, budget) for one in zip(stems, configs) for budget in axes.budgets
    ):
        lender = None
        for method in axes.methods:
            # The name of a plug-in may have any character.
            name = re.sub(r"[^\w.+%-]", "_", "-".join(filter(None, (stem, method, budget))))
            given = {**options, "merge_method": method, "budget": budget,
                     "output": str(output / name)}  # fmt: skip
            config = collect(errors, partial(load_config, path, given))
            if not config:
                continue
            if config.budget.in_bytes:
                problem = f"budgets: found {budget!r}, expected numbers of adapters to merge"
                errors.append(ConfigError(problem))
                break
            asked = config.model_fields_set
            config = config.replace(**{k: v for k, v in _UNASKED.items() if k not in asked})
            own = config.replace(clusters=None)
            if config.clusters and "shared" not in axes.clusters:
                errors.append(ConfigError(f"clusters: found {config.clusters}, which no run would"
                                          " merge; pass --on shared, or leave it out"))  # fmt: skip
                continue
            if not config.clusters and lender is None:
                lender = str(output / name / "clusters.json")
                found.append(Entry(name, stem, axes.clusters, own))
                continue
            if "own" in axes.clusters:
                found.append(Entry(name, stem, ("own",), own))
            if "shared" in axes.clusters:
                where = {"clusters": config.clusters or lender, "output": f"{output / name}-shared"}
                found.append(Entry(f"{name}-shared", stem, ("shared",), config.replace(**where)))
    return found


def _measured(entry: Entry) -> dict[str, Any]:
    """What the losses of rows depend on, as the run's bench names it."""
    found = entry.run.read("bench.json")["provenance"]
    tests = {task: one["test"] for task, one in found["inputs"].items()}
    return {"pack": found["pack"]["manifest_sha256"], "base": found["base"], "tests": tests}


def _row(entry: Entry, kind: str) -> dict[str, Any]:
    """A run in `compare.json`."""
    finished = entry.run
    return {
        "name": entry.name, "config": entry.source, "budget": entry.config.budget.text,
        "clusters": kind, "method": entry.config.merge_method,
        "members": [one["members"] for one in finished.read("merges.json")],
        **finished.read("bench.json")["methods"]["pack"],
    }  # fmt: skip


def _pairs(runs: Sequence[dict[str, Any]], rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every two methods on the same rows, at the same budget and on the same kind of clusters."""
    same = ("config", "budget", "clusters")
    return [
        {**{key: ours[key] for key in same}, "ours": ours["method"], "theirs": theirs["method"],
         **paired_bootstrap(rows[ours["name"]], rows[theirs["name"]])}
        for theirs, ours in combinations(runs, 2)
        if all(ours[key] == theirs[key] for key in same)
    ]  # fmt: skip
