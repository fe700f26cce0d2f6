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
from d2c_mlx.packs.overwrite import MARKER, listed, mark
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.report.comparison import render_csv, render_plot, render_runs
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.run.inputs import Inputs, read_inputs
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import ConfigError, InputError, collect
from d2c_mlx.utils.files import write_json, write_text
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.progress import Progress, say

__all__ = ["CLUSTERS", "Axes", "Comparison", "Entry"]

# Clusters that are merged: those of the first method, or each method's own.
CLUSTERS = ("shared", "own")
# Files of a comparison, beside the directories of its runs.
_WRITES = ("compare.json", "compare.md", "compare.csv", "compare.svg", "rows")


@dataclass(frozen=True)
class Axes:
    """What is compared: every method at every budget, on the clusters of every kind.

    Attributes:
        methods: merge methods; the others are compared with the first.
        budgets: texts of budgets; bytes are planned, once for all methods.
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
        clusters: the kinds of clusters that it counts for; "planned" for a budget in bytes.
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

    def measured(self) -> dict[str, Any]:
        """Key of the losses of its rows, under the name that the run's bench has."""
        provenance = self.run.read("bench.json")["provenance"]
        tests = {task: hashes["test"] for task, hashes in provenance["inputs"].items()}
        pack = provenance["pack"]["manifest_sha256"]
        return {"pack": pack, "base": provenance["base"], "tests": tests}

    def row(self, kind: str) -> dict[str, Any]:
        """The run in `compare.json`."""
        run = self.run
        # Bytes with room for all adapters are not planned, but copied.
        if kind == "planned" and run.path("plan.json").exists():
            members = [unit["tasks"] for unit in run.read("plan.json")["units"]]
        else:
            members = [merge["members"] for merge in run.read("merges.json")]
        return {
            "name": self.name,
            "config": self.source,
            "budget": self.config.budget.text,
            "clusters": kind,
            "method": "plan" if kind == "planned" else self.config.merge_method,
            "members": members,
            **run.read("bench.json")["methods"]["pack"],
        }


class Comparison:
    """The runs of a comparison: make one, look at `left` and `seconds`, then `run`.

    Attributes:
        output: directory of the runs and of the table.
        entries: the runs, in their order.
        left: those that are not done.
        quiet: show no progress.
    """

    def __init__(
        self,
        configs: Sequence[Path | None],
        options: Mapping[str, object],
        axes: Axes,
        output: Path,
        quiet: bool = False,
    ) -> None:
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
        there = [name for name in (MARKER, *_WRITES) if (output / name).exists()]
        if there and not listed(output, "compare"):
            errors.append(
                ConfigError(
                    f"output: {output} holds {', '.join(there)}, which no comparison wrote; give"
                    " another --output"
                )
            )
        stems = [config.stem if config else "" for config in configs]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            line = f"CONFIG: several are called {', '.join(twice)}; rename some"
            errors.append(ConfigError(line))
        self.entries = [
            entry
            for stem, path in zip(stems, configs)
            for budget in axes.budgets
            for entry in _entries_at(
                stem, path, {**options, "budget": budget}, axes, output, errors
            )
        ]
        if not all(entry.config.tasks for entry in self.entries):
            errors.append(
                ConfigError("tasks: not given; compare judges on held-out rows: pass --tasks DIR")
            )
        _raise(errors)
        self._inputs: dict[str, Inputs] = {}
        self.left = [e for e in self.entries if not e.run.finished() or self._rows(e) is None]
        self._check(errors)
        _raise(errors)

    def _check(self, errors: list[InputError]) -> None:
        """Load the inputs of every config with something to do, and check each of its runs."""
        tried, lent = set(), {f"{entry.config.output}/clusters.json" for entry in self.entries}
        for entry in self.left:
            # What cannot be loaded at a budget cannot with another method either.
            key = entry.source, entry.config.budget.text
            if key in tried and entry.source not in self._inputs:
                continue
            tried.add(key)
            # Clusters of another run of this comparison are not there yet.
            there = None if entry.config.clusters in lent else entry.config.clusters
            config = entry.config.replace(clusters=there)
            collect(errors, partial(self._inputs_of, entry.source, config))

    def _inputs_of(self, source: str, config: RunConfig) -> Inputs:
        """Inputs of a run, which share what was loaded for the first run of its config."""
        if source not in self._inputs:
            self._inputs[source] = read_inputs(
                config.replace(clusters=None), Progress(not self.quiet)
            )
        return self._inputs[source].of(config)

    def seconds(self) -> float:
        """About how long the runs that are not done take here, see `forecast`.

        Runs of one config share the losses of `probe`, and those on given clusters have no search.
        """
        total, seen = 0.0, {entry.source for entry in self.entries if entry not in self.left}
        for entry in self.left:
            # As if nothing were done.
            new = entry.config.replace(output=str(self.output / ".new"), clusters=None)
            for stage in forecast(new, inputs=self._inputs_of(entry.source, new)).stages:
                shared = stage.name in ("answer", "probe") and entry.source in seen
                given = stage.name == "cluster" and entry.config.clusters
                total += 0.0 if shared or given else stage.seconds
            seen.add(entry.source)
        return total

    def run(self) -> dict[str, Any]:
        """Do what is not done -> `compare.json`, `.md`, `.csv`, `.svg` and `rows/`.

        Returns:
            The content of `compare.json`.

        Raises:
            D2CError: a run failed; those before it are kept.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        mark(self.output, "compare", dict.fromkeys(_WRITES))
        losses = {}
        for i, entry in enumerate(self.entries):
            rows = self._rows(entry) if entry.run.finished() else None
            done = "" if rows is None else ", done"
            say(f"run {i + 1} of {len(self.entries)}: {entry.name}{done}", self.quiet)
            losses[entry.name] = self._measure(entry) if rows is None else rows
        runs = [entry.row(kind) for entry in self.entries for kind in entry.clusters]
        content = {"runs": runs, "pairs": _pairs(runs, losses)}
        write_json(self.output / "compare.json", content)
        write_text(self.output / "compare.md", render_runs(content))
        write_text(self.output / "compare.csv", render_csv(content))
        write_text(self.output / "compare.svg", render_plot(content))
        return content

    def _measure(self, entry: Entry) -> dict[str, np.ndarray]:
        """Run an entry and measure its pack on single held-out rows -> `rows/<name>.json`."""
        finished = run(
            entry.config, quiet=self.quiet, inputs=self._inputs_of(entry.source, entry.config)
        )
        pack, library = load_pack(finished.path("pack")), finished.library
        serves = {test.task: pack.load(test.task) for test in library.held_out}
        losses = row_losses(library.scorer.engine, serves, library.held_out)
        rows = {task: values.tolist() for task, values in losses.items()}
        write_json(self._rows_file(entry), {"of": entry.measured(), "rows": rows})
        return losses

    def _rows_file(self, entry: Entry) -> Path:
        return self.output / "rows" / f"{entry.name}.json"

    def _rows(self, entry: Entry) -> dict[str, np.ndarray] | None:
        """The losses of rows that were measured on this very pack and these rows, or None."""
        content = json_or_none(self._rows_file(entry))
        if not isinstance(content, dict) or content.get("of") != entry.measured():
            return None  # of an older pack, or damaged
        return {task: np.array(rows) for task, rows in content["rows"].items()}


def _raise(errors: Sequence[InputError]) -> None:
    """Raise the problems of all errors, each once: runs of one config share most of theirs."""
    if errors:
        raise InputError(dict.fromkeys(line for error in errors for line in error.problems))


def _entries_at(
    stem: str, path: Path | None, options: Mapping[str, object], axes: Axes, output: Path,
    errors: list[InputError],
) -> list[Entry]:  # fmt: skip
    """The runs of one config at one budget; all share the clusters of the first method's run."""
    entries: list[Entry] = []
    for method in axes.methods:
        # The name of a plug-in may have any character.
        parts = [stem, method, str(options["budget"])]
        name = re.sub(r"[^\w.+%-]", "_", "-".join(filter(None, parts)))
        given = {**options, "merge_method": method, "output": str(output / name)}
        config = collect(errors, partial(load_config, path, given))
        if not config:
            continue
        config = config.replace(baselines=())
        if config.budget.in_bytes:
            name = "-".join(filter(None, (stem, "plan", config.budget.text)))
            planned = config.replace(merge_method=None, output=str(output / name))
            return [Entry(name, stem, ("planned",), planned)]
        if config.clusters and "shared" not in axes.clusters:
            errors.append(ConfigError(f"clusters: found {config.clusters}, which no run would"
                                      " merge; pass --on shared, or leave it out"))  # fmt: skip
            continue
        alone = config.replace(clusters=None)
        if not config.clusters and not entries:
            entries.append(Entry(name, stem, axes.clusters, alone))
            continue
        if "own" in axes.clusters:
            entries.append(Entry(name, stem, ("own",), alone))
        if "shared" in axes.clusters:
            lent = config.clusters or f"{entries[0].config.output}/clusters.json"
            shared = config.replace(clusters=lent, output=f"{output / name}-shared")
            entries.append(Entry(f"{name}-shared", stem, ("shared",), shared))
    return entries


def _pairs(runs: Sequence[dict[str, Any]], rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every two methods on the same rows, at the same budget and on the same kind of clusters."""
    pairs = []
    for theirs, ours in combinations(runs, 2):
        place = {key: ours[key] for key in ("config", "budget", "clusters")}
        if place.items() <= theirs.items():
            difference = paired_bootstrap(rows[ours["name"]], rows[theirs["name"]])
            pairs.append({**place, "ours": ours["method"], "theirs": theirs["method"],
                          **difference})  # fmt: skip
    return pairs
