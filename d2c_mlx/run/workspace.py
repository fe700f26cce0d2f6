"""What the stages of one run share: base model, adapters, examples, and what is done already."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.similarity import similarity, svd_features
from d2c_mlx.adapters.sources import find_adapters, read_adapters
from d2c_mlx.cluster.completion import completed
from d2c_mlx.cluster.partition import Members, Problem
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.capacity import Capacity
from d2c_mlx.evaluate.attribution import module_gains
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.distributed import Group, Ranks, local_ranks
from d2c_mlx.evaluate.engine import Engine, Savings
from d2c_mlx.evaluate.evaluator import Counts, Evaluator, LossTable
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.merge.kl_regret import Expected
from d2c_mlx.merge.layerwise import check_blocks
from d2c_mlx.merge.merger import Merger
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.tasks import Task, load_tasks, load_unlabelled
from d2c_mlx.models.tokenize import encode_probes, encode_tests
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.overwrite import check_run
from d2c_mlx.run.records import Record
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import InputError, collect, gather
from d2c_mlx.utils.files import write_text
from d2c_mlx.utils.progress import progress_bar

__all__ = ["CUTS", "Workspace"]

# Shares of a task's probe rows after which an evaluation may stop: most candidates of D2C are
# several times worse than what a task has.
CUTS = (0.2, 0.5)


class Workspace:
    """A run directory and what its stages need, each thing loaded once and only if asked for."""

    def __init__(self, config: RunConfig, quiet: bool = False, group: Group | None = None) -> None:
        """Check all inputs; nothing is written before every one is good.

        Args:
            config: of the run.
            quiet: show no progress.
            group: of the ranks that share the evaluations; None is this process alone.

        Raises:
            InputError: every problem of adapters, tasks and budget, one line each; without a
                base model, to which they must fit, the problem of the model alone.
        """
        self.config, self.quiet = config, quiet
        self.output = Path(config.output)
        self.base = BaseModel(config.model)
        self.engine = Engine(
            self.base,
            config.memory_bytes,
            Savings(
                stack=config.stack,
                **dict.fromkeys(set(config.without) - {"cache", "bound"}, False),
            ),
            local_ranks(),
        )
        self.runner = Ranks(self.engine, group) if group else self.engine
        errors: list[InputError] = []
        sources = collect(errors, lambda: find_adapters(config.adapters)) or []
        collect(errors, lambda: check_run(config, sources))
        inputs = collect(errors, lambda: read_adapters(sources, self.base)) or []
        names = [source.name for source in sources]
        tasks = collect(errors, lambda: load_tasks(Path(config.tasks), names)) or []
        self.inputs: list[Adapter] = inputs
        self.tasks: list[Task] = tasks
        self.capacity = Capacity(self.base, inputs, parse_budget(config.budget), config.merge_rank)
        if not errors:
            collect(errors, lambda: self.probes)
            collect(errors, lambda: self.tests)
            collect(errors, lambda: self.capacity.merge_rank and (
                self.capacity.room if config.planned else self.capacity.n_clusters))  # fmt: skip
            collect(errors, lambda: self.prompts)
        if config.refine:
            collect(errors, lambda: Distiller(self.base))
        if config.merge_method == "layerwise":
            collect(errors, lambda: check_blocks(self.base))
        if not errors:
            sets = [part for one in (*self.probes, *self.tests) for part in (one, *one.parts)]
            collect(errors, lambda: gather(partial(self.engine.batches, one) for one in sets))
        if errors:
            raise InputError([line for error in errors for line in error.problems])
        self.cache = None
        if "cache" not in config.without:
            self.cache = LossCache(cache_directory() / "losses.sqlite")
        self.evaluator = Evaluator(self.runner, self.cache)

    @property
    def names(self) -> list[str]:
        """Adapter names, sorted; the order of every table."""
        return [adapter.name for adapter in self.inputs]

    @cached_property
    def probes(self) -> list[ExampleSet]:
        """The examples that decide."""
        n = self.config.probe_examples
        return [one.cut(*CUTS) for one in encode_probes(self.base.encode, self.tasks, n)]

    @cached_property
    def tests(self) -> list[ExampleSet]:
        """The examples that judge."""
        n = self.config.test_examples or None
        # Halves, so that an adapter of one task keeps two cores busy.
        return [one.cut(0.5) for one in encode_tests(self.base.encode, self.tasks, n)]

    @cached_property
    def prompts(self) -> dict[str, ExampleSet]:
        """Task -> its prompts without answers, where there are some."""
        if not self.config.unlabelled:
            return {}
        n = self.config.probe_examples
        rows = load_unlabelled(Path(self.config.unlabelled), self.tasks, n)
        names = sorted(rows)
        encoded = gather(
            partial(self.base.encode, name, rows[name], [
                f"{self.config.unlabelled}: row {i + 1} of task {name}"
                for i in range(len(rows[name]))
            ])
            for name in names
        )  # fmt: skip
        return dict(zip(names, encoded))

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The converted adapters, read back from the run directory."""
        return [load_adapter(self.output / "adapters" / name) for name in self.names]

    @cached_property
    def similarity(self) -> np.ndarray:
        """`(n, n)` cosines of the adapters' dW."""
        return similarity(self.adapters)

    @cached_property
    def table(self) -> LossTable:
        """`losses.json`."""
        return LossTable.from_json(self.read("losses.json"))

    @cached_property
    def gains(self) -> list[dict[str, float]]:
        """What every module of each adapter contributes on its task's probes."""
        # Forwards and backwards, at several points.
        costs = [6 * probe.n_tokens for probe in self.probes]
        self.evaluator.meter.expect(sum(costs))
        found = []
        for adapter, probe, cost in zip(self.adapters, self.probes, costs):
            found.append(module_gains(self.base, adapter, probe, cache=self.cache))
            self.evaluator.meter.advance(cost)
        return found

    @cached_property
    def expected(self) -> Expected:
        """What the own adapters expect of others on their probes."""
        return Expected(
            self.base, self.evaluator, self.adapters, self.probes, self.problem,
            self.engine.separate is not None,
        )  # fmt: skip

    @cached_property
    def problem(self) -> Problem:
        """What the clusterings may ask, answered by the model."""
        problem = Problem(
            base=self.table.base,
            table=self.table.values,
            merge=lambda members, like=(): self.merger.quick(members, like).adapter,
            losses=self._losses,
            features=svd_features(self.similarity),
            foresee=self._foresee,
        )
        return completed(problem)

    @cached_property
    def merger(self) -> Merger:
        """What merges the adapters, each set of members once.

        A plan compares merges with adapters that are stored in few bits, so they are tuned alike.
        """
        if not self.config.planned:
            return self.merger_of(self.config)
        return Merger(
            self.config, self.base, self.evaluator, self.adapters, self.expected.sets,
            self.expected.regret, self.engine.workers,
        )  # fmt: skip

    def merger_of(self, config: RunConfig) -> Merger:
        """One that merges with other options, tuned by the probes' answers."""
        return Merger(
            config, self.base, self.evaluator, self.adapters, self.probes,
            lambda losses, tasks: self.problem.regret(losses, tasks), self.engine.workers,
        )  # fmt: skip

    def _foresee(self, merges: Sequence[Members]) -> None:
        tokens = [probe.n_tokens for probe in self.probes]
        self.evaluator.meter.foresee(sum(tokens[i] for members in merges for i in members))

    def _losses(
        self,
        jobs: Sequence[tuple[Adapter, Sequence[int]]],
        limits: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        if limits is not None and "bound" in self.config.without:
            limits = [np.full_like(limit, np.inf) for limit in limits]
        sets = [(merge, [self.probes[i] for i in tasks]) for merge, tasks in jobs]
        return self.evaluator.losses(sets, limits)

    def packed(self, adapter: Adapter) -> Adapter:
        """The adapter as a pack stores it: one rank, one scale, the base's dtype."""
        return adapter.uniform(self.base.dtype)

    def path(self, name: str) -> Path:
        """A path in the run directory."""
        return self.output / name

    def read(self, name: str) -> dict:
        """A JSON artifact of the run directory."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def stage(self, name: str, options: object, reads: Sequence[str], writes: Sequence[str],
              body: Callable[[], None]) -> None:  # fmt: skip
        """Run `body` unless it already ran on the same inputs and its outputs are untouched.

        Args:
            name: of the stage.
            options: JSON value of everything that matters beside files of the run directory.
            reads: artifacts of earlier stages.
            writes: artifacts that `body` makes.
            body: does the work.
        """
        record = Record(self.output, name, options, reads)
        if record.holds():
            return
        started = time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.path("config.yaml"), yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        self.evaluator.counts = Counts()
        mx.reset_peak_memory()
        with progress_bar(name, self.quiet) as bar:
            self.evaluator.meter = bar
            body()
        measured = {
            "seconds": round(time.monotonic() - started, 2),
            "evaluations": asdict(self.evaluator.counts),
            "peak_nbytes": mx.get_peak_memory(),
        }
        record.write(writes, measured)
