"""Many runs in one table: every merge method at every budget, on the same clusters.

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

from d2c_mlx.evaluate.heldout import paired_bootstrap
from d2c_mlx.forecast import forecast
from d2c_mlx.packs.overwrite import MARKER, listed, mark
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig, load_config
from d2c_mlx.run.inputs import Inputs, read_inputs
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import ConfigError, InputError, collect
from d2c_mlx.utils.files import write_json, write_text
from d2c_mlx.utils.progress import Progress, say
from d2c_mlx.utils.templates import percent, table

__all__ = ["Comparison", "Entry", "render_runs"]

# Files of a comparison, beside the directories of its runs.
_WRITES = ("compare.json", "compare.md")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison.

    Attributes:
        name: its directory, below that of the comparison.
        source: name of the config; "" for options without a file.
        config: its options.
    """

    name: str
    source: str
    config: RunConfig

    def row(self) -> dict[str, Any]:
        """The run in `compare.json`; a budget in bytes is planned, whatever the method."""
        finished, planned = Run(self.config), self.config.budget.in_bytes
        # Bytes with room for all adapters are not planned, but copied.
        if planned and finished.path("plan.json").exists():
            members = [unit["tasks"] for unit in finished.read("plan.json")["units"]]
        else:
            members = [merge["members"] for merge in finished.read("merges.json")]
        return {
            "name": self.name,
            "config": self.source,
            "budget": self.config.budget.text,
            "method": "plan" if planned else self.config.merge_method,
            "members": members,
            **finished.read("bench.json")["methods"]["pack"],
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
        methods: Sequence[str],
        budgets: Sequence[str],
        output: Path,
        quiet: bool = False,
    ) -> None:
        """Read all configs and check all inputs; nothing is written.

        Args:
            configs: YAML files of options; None is no file.
            options: options that replace those of the files.
            methods: merge methods. The others are compared with the first, and merge the clusters
                of its run, or those that `clusters` of a config names.
            budgets: texts of budgets; bytes are planned, once for all methods.
            output: the directory.
            quiet: show no progress.

        Raises:
            InputError: every problem of every run, one line each.
        """
        self.output, self.quiet = output, quiet
        if any(name in os.environ for name in RANK_VARIABLES):
            raise ConfigError("compare: found an mlx.launch, expected one process; run it alone")
        errors: list[InputError] = []
        for name, values in (("merge_methods", methods), ("budgets", budgets)):
            if not values or len(set(values)) < len(values):
                line = f"{name}: found {','.join(values)!r}, expected a list without repeats"
                errors.append(ConfigError(line))
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
        self.entries: list[Entry] = []
        for stem, path in zip(stems, configs):
            for budget in budgets:
                given = {**options, "budget": budget}
                self.entries += _entries_at(stem, path, given, methods, output, errors)
        if not all(entry.config.tasks for entry in self.entries):
            line = "tasks: not given; compare judges on held-out rows: pass --tasks DIR"
            errors.append(ConfigError(line))
        _raise(errors)
        self.left = [entry for entry in self.entries if not Run(entry.config).finished()]
        self._inputs: dict[str, Inputs | None] = {}
        lent = {f"{entry.config.output}/clusters.json" for entry in self.entries}
        for entry in self.left:
            config, first = entry.config, entry.config.replace(clusters=None)
            if entry.source not in self._inputs:
                read = partial(read_inputs, first, Progress(not quiet))
                self._inputs[entry.source] = collect(errors, read)
            if inputs := self._inputs[entry.source]:
                # Clusters of another run of this comparison are not there yet.
                now = first if config.clusters in lent else config
                collect(errors, partial(inputs.of, now))
        _raise(errors)

    def _inputs_of(self, entry: Entry, config: RunConfig) -> Inputs:
        """Inputs of a run, which share what was loaded for the first run of its config."""
        inputs = self._inputs[entry.source]
        assert inputs, "every run that is left was checked"
        return inputs.of(config)

    def seconds(self) -> float:
        """About how long the runs that are not done take here, see `forecast`.

        Runs of one config share the losses of `probe`, and those on given clusters have no search.
        """
        total, seen = 0.0, {entry.source for entry in self.entries if entry not in self.left}
        for entry in self.left:
            # As if nothing were done.
            new = entry.config.replace(output=str(self.output / ".new"), clusters=None)
            shared = {"answer", "probe"} if entry.source in seen else set()
            shared |= {"cluster"} if entry.config.clusters else set()
            stages = forecast(new, inputs=self._inputs_of(entry, new)).stages
            total += sum(stage.seconds for stage in stages if stage.name not in shared)
            seen.add(entry.source)
        return total

    def run(self) -> dict[str, Any]:
        """Do what is not done -> `compare.json` and `compare.md`.

        Returns:
            The content of `compare.json`.

        Raises:
            D2CError: a run failed; those before it are kept.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        mark(self.output, "compare", dict.fromkeys(_WRITES))
        for i, entry in enumerate(self.entries):
            done = "" if entry in self.left else ", done"
            say(f"run {i + 1} of {len(self.entries)}: {entry.name}{done}", self.quiet)
            if not done:
                run(entry.config, quiet=self.quiet, inputs=self._inputs_of(entry, entry.config))
        self.left = []
        content = {"runs": [entry.row() for entry in self.entries], "pairs": self._pairs()}
        write_json(self.output / "compare.json", content)
        write_text(self.output / "compare.md", render_runs(content))
        return content

    def _pairs(self) -> list[dict[str, Any]]:
        """Every two methods on the same rows and at the same budget."""
        pairs = []
        for theirs, ours in combinations(self.entries, 2):
            budget = ours.config.budget.text
            if (theirs.source, theirs.config.budget.text) == (ours.source, budget):
                first, second = (
                    {
                        task: np.array(losses)
                        for task, losses in Run(entry.config).read("bench.json")["rows"].items()
                    }
                    for entry in (ours, theirs)
                )
                pairs.append(
                    {
                        "config": ours.source,
                        "budget": budget,
                        "ours": ours.config.merge_method,
                        "theirs": theirs.config.merge_method,
                        **paired_bootstrap(first, second),
                    }
                )
        return pairs


def _raise(errors: Sequence[InputError]) -> None:
    """Raise the problems of all errors, each once: runs of one config share most of theirs."""
    if errors:
        raise InputError(dict.fromkeys(line for error in errors for line in error.problems))


def _entries_at(
    stem: str,
    path: Path | None,
    options: Mapping[str, object],
    methods: Sequence[str],
    output: Path,
    errors: list[InputError],
) -> list[Entry]:
    """The runs of one config at one budget; all share the clusters of the first method's run."""
    entries: list[Entry] = []
    for method in methods:
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
            return [Entry(name, stem, planned)]
        if entries and not config.clusters:
            first = entries[0].config
            config = config.replace(clusters=first.clusters or f"{first.output}/clusters.json")
        entries.append(Entry(name, stem, config))
    return entries


def render_runs(content: Mapping[str, Any]) -> str:
    """The table of a comparison as Markdown.

    Args:
        content: content of `compare.json`.
    """
    pairs: dict[tuple[str, str, str], dict[str, Any]] = {}
    for pair in content["pairs"]:
        pairs.setdefault((pair["config"], pair["budget"], pair["ours"]), pair)
    places = list(dict.fromkeys((row["config"], row["budget"]) for row in content["runs"]))
    runs = sorted(content["runs"], key=lambda row: row["excess"])
    rows = []
    for row in sorted(runs, key=lambda row: places.index((row["config"], row["budget"]))):
        pair, beside = pairs.get((row["config"], row["budget"], row["method"])), ""
        if pair:
            # An interval needs two rows of every task.
            missing = pair["low"] is None
            between = "too few rows" if missing else f"{pair['low']:+.4f} to {pair['high']:+.4f}"
            beside = f"{pair['difference']:+.4f} ({between})"
        rows.append(
            [row["config"], row["budget"], row["method"], f"{row['nbytes']:,}",
             f"{row['loss']:.4f}", f"{row['excess']:.4f}", percent(row["retention"]), beside]
        )  # fmt: skip
    head = ["config", "budget", "method", "bytes", "loss", "excess", "kept",
            "beside the first method"]  # fmt: skip
    return (
        f"{table(head, rows, n_left=3)}\n\n"
        "Excess: nats per target token above the individual adapters, on held-out rows. Beside the"
        " first method: the loss less the one of the method that was named first, with its 95 %"
        " interval by a paired bootstrap over the rows; below 0 is better.\n"
    )
