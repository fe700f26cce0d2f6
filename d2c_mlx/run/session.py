"""The session of a run: what its stages share, each thing loaded once and only if asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import left_in_file, read_adapter
from d2c_mlx.compress.planner import Planner
from d2c_mlx.evaluate.distributed import Group
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.loss_table import LossTable
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import method_of
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.directory import RunDirectory, absolute
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.overwrite import mark_run
from d2c_mlx.run.records import Record
from d2c_mlx.utils.device import process_peak
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.files import remove_dir, write_text
from d2c_mlx.utils.progress import Progress

__all__ = ["Session", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it reads and writes, and how.

    Attributes:
        name: name of the stage.
        options: everything that the outputs depend on besides `reads`, as a JSON value.
        reads: artifacts of earlier stages that `body` reads.
        writes: artifacts that `body` makes.
        body: does the work.
        leftovers: directories of parts that are removed once the stage is done.
    """

    name: str
    options: object
    reads: Sequence[str]
    writes: Sequence[str]
    body: Callable[[], None]
    leftovers: Sequence[str] = ()


class Session:
    """One run at work: its inputs, its directory, and its library.

    Attributes:
        config: options of the run.
        directory: the run directory, with its artifacts.
        quiet: show no progress.
    """

    def __init__(
        self,
        config: RunConfig,
        quiet: bool = False,
        group: Group | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """Make a session; nothing is loaded yet.

        Args:
            config: options of the run.
            quiet: show no progress.
            group: the ranks that share the evaluations; None is this process alone.
            inputs: loaded for these options already; None loads them when they are needed.
        """
        self.config, self.quiet, self._group = config, quiet, group
        self.directory = RunDirectory(Path(config.output))
        if inputs:
            self.inputs = inputs

    @property
    def output(self) -> Path:
        """The run directory."""
        return self.directory.root

    def path(self, name: str) -> Path:
        """Path of an artifact of the run: `pack`, `bench.json`."""
        return self.directory.path(name)

    def read(self, name: str) -> Any:  # noqa: ANN401  JSON is any
        """Content of a JSON artifact of the run: `bench.json`, `merges.json`."""
        return self.directory.read(name)

    @cached_property
    def inputs(self) -> Inputs:
        """Base model, adapters and rows, checked; raises the errors of `Inputs`."""
        return Inputs(self.config)

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer of losses: cached, and run here or by all ranks."""
        cache = LossCache(cache_directory() / "losses.sqlite")
        return Scorer(self.inputs.engine, cache, Progress(not self.quiet), self._group)

    def load(self) -> None:
        """Load and check all inputs, on every rank; nothing is written in the run directory.

        Raises:
            InputError: see `Inputs`.
            D2CError: another rank cannot load the base model.
        """
        _ = self.scorer

    @property
    def copies(self) -> bool:
        """True if a budget to plan for has room for every adapter, so that all are copied."""
        return self.config.planned and self.inputs.holds_all

    @property
    def planned(self) -> bool:
        """True if the planner chooses what is stored."""
        return self.config.planned and not self.copies

    @property
    def baselines(self) -> tuple[str, ...]:
        """Partitions that bench merges too; none beside copies."""
        return () if self.copies else self.config.baselines

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The converted adapters, in the files of the run directory."""
        return [self.stored_adapter(f"adapters/{name}") for name in self.inputs.names]

    def stored_adapter(self, name: str) -> Adapter:
        """An adapter of the run directory, its numbers left in the file: `merged/0`."""
        return left_in_file(read_adapter(self.path(name)), self.path(name))

    @cached_property
    def library(self) -> Library:
        """The converted adapters with their rows, and with losses once `probe` measured them."""
        inputs = self.inputs
        library = Library(self.adapters, inputs.encoded, self.scorer)
        if not self.config.has_rows or not self.path("losses.json").exists():
            return library
        return library.measured(LossTable.from_json(self.read("losses.json")))

    @property
    def planner(self) -> Planner:
        """The planner of a budget in bytes."""
        return Planner(self.library, self.inputs.capacity, self.config.merging)

    @property
    def unused(self) -> list[str]:
        """Names of defaults that the base model's architecture does not allow."""
        if not self.config.has_rows:
            return []
        merges = not self.planned and self.config.merge_method is None
        method = method_of(self.library, self.config.merging)
        return ["layerwise"] * (merges and method != "layerwise")

    def keep_options(self) -> None:
        """Mark the directory as a run's, and write the options of this run into it."""
        mark_run(self.output)
        text = yaml.safe_dump(absolute(self.config).to_dict(), sort_keys=False)
        write_text(self.path("config.yaml"), text)

    def done(self, stage: Stage) -> bool:
        """True if a stage already ran on the same inputs and its outputs are untouched."""
        return self._record(stage).holds(stage.writes)

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done."""
        record = self._record(stage)
        if not record.holds(stage.writes):
            self._run(stage, record)
        # Only after the stage is recorded: a half-removed directory would be taken for done.
        for name in stage.leftovers:
            remove_dir(self.path(name))

    def _record(self, stage: Stage) -> Record:
        return Record(self.output, stage.name, stage.options, stage.reads)

    def _run(self, stage: Stage, record: Record) -> None:
        started = time.monotonic()
        before = self.scorer.counts
        mx.reset_peak_memory()
        with self.scorer.progress.section(stage.name):
            stage.body()
        measured = {
            "seconds": round(time.monotonic() - started, 2),
            "evaluations": asdict(self.scorer.counts.since(before)),
            "peak_nbytes": mx.get_peak_memory(),
            "process_peak_nbytes": process_peak(),
        }
        record.write(stage.writes, measured)
