"""The inputs of a run, read and checked as a whole before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import BaseWeights
from d2c_mlx.adapters.reading import read_adapters
from d2c_mlx.adapters.sources import Source, find_adapters
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.capacity import Capacity
from d2c_mlx.evaluate.answers import OwnAnswers, check_prompts
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.distributed import local_ranks
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.merge.layerwise import check_blocks
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import blocks_are_exact
from d2c_mlx.models.resolve import same_weights
from d2c_mlx.models.rows import Row
from d2c_mlx.models.tasks import (
    Task,
    TaskRows,
    encode_probes,
    encode_tests,
    load_task,
    load_tasks,
    load_unlabelled,
    spare_tasks,
)
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.config_file import read_clusters
from d2c_mlx.run.overwrite import check_run
from d2c_mlx.utils.device import device_name
from d2c_mlx.utils.errors import ConfigError, InputError, collect, gather, warn
from d2c_mlx.utils.templates import size, span

__all__ = ["Inputs", "opening"]

# Where in a run directory the answers to prompts are.
_ANSWERED = "answered"


class Inputs:
    """Base model, adapters, rows and budget of a run.

    Attributes:
        config: options of the run.
        base: the base model.
        engine: evaluates adapters on `base`.
        adapters: adapters as they were given, sorted by name.
        tasks: one task per adapter, in the same order; none without rows.
        asked: prompts that the adapters answer; only with `config.unlabelled`.
        capacity: bytes of the adapters and of the budget.
    """

    def __init__(self, config: RunConfig) -> None:
        """Read and check everything; nothing is written.

        Args:
            config: options of the run.

        Raises:
            InputError: every problem of adapters, tasks and budget, one line each. If the base
                model cannot be loaded, its problem alone: the others must fit it.
        """
        self.config = config
        self.base = BaseModel(config.model)
        self.engine = Engine(self.base, n_processes=local_ranks())
        errors: list[InputError] = []
        sources: Sequence[Source] = collect(errors, lambda: find_adapters(config.adapters)) or []
        self._sources = sources
        collect(errors, lambda: check_run(config, sources))
        # Who lists adapters one by one leaves out others on purpose.
        in_folders = all(source.folder for source in sources)
        known = [source.name for source in sources]
        if config.skip_bad:
            sources = self._usable(sources)
        self.adapters: list[Adapter] = collect(errors, lambda: self._read(sources)) or []
        names = [source.name for source in sources]
        self.tasks: list[TaskRows] = collect(errors, lambda: self._load_tasks(names)) or []
        folder = Path(config.tasks) if config.tasks else None
        if not errors and in_folders and folder and (spare := spare_tasks(folder, known)):
            warn(f"tasks: no adapter is called {', '.join(spare)}, so these rows are not used")
        self._fit(errors)
        _ = self.clusters

    def _load_tasks(self, names: Sequence[str]) -> list[TaskRows]:
        """The rows of the run; stand-ins where adapters have yet to answer, none without any."""
        config = self.config
        tasks = load_tasks(Path(config.tasks), names) if config.tasks else []
        if not config.unlabelled:
            return tasks
        n, known = config.probe_examples, tasks or [TaskRows(name, (), ()) for name in names]
        left_out = [TaskRows(source.name, (), ()) for source in self._sources
                    if source.name not in names]  # fmt: skip
        found = load_unlabelled(Path(config.unlabelled), [*known, *left_out], n)
        asked = {name: rows for name, rows in found.items() if name in names}
        place = Path(config.output) / _ANSWERED
        digests = {one.name: one.digest for one in self.adapters if one.name in asked}
        by = [self.base.answers_hash, digests] if digests else None
        self.asked = OwnAnswers(place, asked, None if tasks else n, by)
        return tasks or self.asked.tasks(names)

    def take_answers(self) -> None:
        """Read the rows again, after the adapters have answered."""
        if self.config.answered:
            self.tasks = self.asked.tasks(self.names)
        for name in ("probes", "tests", "answers"):
            vars(self).pop(name, None)
        self._check_memory()

    def of(self, config: RunConfig) -> Inputs:
        """The same model, adapters and rows for a run that merges otherwise.

        Args:
            config: options that differ in budget, merging, clusters or output.

        Raises:
            InputError: every problem of the other options, one line each.
        """
        other = copy(self)
        other.config = config
        if config.unlabelled:
            other.asked = self.asked.in_place(Path(config.output) / _ANSWERED)
            vars(other).pop("answers", None)
        vars(other).pop("clusters", None)
        errors: list[InputError] = []
        collect(errors, lambda: check_run(config, self._sources))
        other._fit(errors)
        return other

    def _fit(self, errors: list[InputError]) -> None:
        """Make the capacity, check all together and raise `errors` with what is found."""
        config = self.config
        budget = parse_budget(config.budget)
        self.capacity = Capacity(self.base, self.adapters, budget, config.merge_rank, config.format)
        self._check(errors)
        if errors:
            raise InputError([line for error in errors for line in error.problems])

    def _read(self, sources: Sequence[Source]) -> list[Adapter]:
        own, is_base = self.base, partial(same_weights, self.base.path)
        weights = BaseWeights(own.weight, self.config.accept_dora)
        return read_adapters(sources, own.module_shapes, own.config, is_base, weights)

    def _usable(self, sources: Sequence[Source]) -> Sequence[Source]:
        """The sources without those that cannot be read or have no rows; all if none is left."""
        kept, left_out, prompts = [], [], self._prompts_alone(sources)
        for source in sources:
            found: list[InputError] = []
            collect(found, partial(self._read, [source]))
            if self.config.tasks:
                collect(found, partial(load_task, Path(self.config.tasks) / source.name))
            if prompts is not None:
                collect(found, partial(check_prompts, prompts, [source.name]))
            if found:
                left_out.append(f"{source.name} ({found[0].problems[0]})")
            else:
                kept.append(source)
        if kept and left_out:
            warn(f"skip_bad: left out {len(left_out)} of {len(sources)}: {'; '.join(left_out)}")
        return kept or sources

    def _prompts_alone(self, sources: Sequence[Source]) -> dict[str, list[Row]] | None:
        """Prompts that are all the rows; None where there are others, or prompts that are wrong."""
        config = self.config
        if not config.unlabelled or config.tasks:
            return None
        tasks = [TaskRows(source.name, (), ()) for source in sources]
        wrong: list[InputError] = []
        return collect(wrong, lambda: load_unlabelled(Path(config.unlabelled or ""), tasks, 0))

    def _check(self, errors: list[InputError]) -> None:
        """Add problems that only show when adapters, rows and model come together."""
        config = self.config
        if not errors:
            collect(errors, lambda: self.probes)
            collect(errors, lambda: self.tests)
            collect(errors, lambda: self.capacity.merge_rank and (
                self.capacity.room if config.planned else self.capacity.n_clusters))  # fmt: skip
            collect(errors, self._check_prompts)
        if config.refine:
            collect(errors, lambda: Distiller(self.base))
        for plugin in config.plugins:
            collect(errors, plugin.load)
        if config.merge_method == "layerwise":
            collect(errors, lambda: check_blocks(self.base))
        if not errors:
            collect(errors, self._check_memory)

    def _check_memory(self) -> None:
        """Raise the error of the longest row that does not fit; what fits it fits the others."""
        self.engine.check_rows(_parts((*self.probes, *self.tests, *self.answers.values())))

    @property
    def names(self) -> list[str]:
        """Adapter names, sorted; the order of every table."""
        return [adapter.name for adapter in self.adapters]

    @property
    def holds_all(self) -> bool:
        """True if the bytes of the budget have room for all adapters as they are."""
        c, most = self.config, self.capacity.max_bytes
        # They are no GGUF files.
        return c.format == "compact" and most is not None and most >= self.capacity.total

    @cached_property
    def clusters(self) -> tuple[int, ...] | None:
        """The cluster of each adapter by `config.clusters`; None without; see `read_clusters`."""
        file = self.config.clusters
        return read_clusters(Path(file), self.names, self.capacity.n_clusters) if file else None

    @cached_property
    def probes(self) -> list[ExampleSet]:
        """Calibration rows of every task, tokenized. All choices are made on them."""
        n = self.config.probe_examples
        return [rows.halved() for rows in encode_probes(self.base.encode, self.tasks, n)]

    @cached_property
    def tests(self) -> list[ExampleSet]:
        """Held-out rows of every task, tokenized. Results are measured on them; no choice is."""
        n = self.config.test_examples or None
        return [rows.halved() for rows in encode_tests(self.base.encode, self.tasks, n)]

    @cached_property
    def answers(self) -> dict[str, ExampleSet]:
        """Task -> its adapter's answers to prompts beside its rows; none before they are there."""
        if not self.config.unlabelled or self.config.answered:
            return {}
        return self._encoded(self.asked.rows(), str(self.asked.directory))

    @property
    def encoded(self) -> list[Task]:
        """Tokenized rows of every task."""
        return [
            Task(rows.name, calibration, held_out, rows, self.answers.get(rows.name))
            for rows, calibration, held_out in zip(self.tasks, self.probes, self.tests)
        ]

    def _check_prompts(self) -> None:
        """Raise the errors of prompts beside rows, or of the answers that are there."""
        config = self.config
        if config.unlabelled and not config.answered:
            automatic = not config.refine and config.merge_method != "layerwise"
            if automatic and not blocks_are_exact(self.base.model):
                raise ConfigError(
                    f"unlabelled: beside --tasks only layer-wise merges read answers to"
                    f" {config.unlabelled}, and blocks of {self.base.name} cannot be run one at a"
                    " time: pass --refine, or leave --unlabelled out"
                )
            self._encoded(self.asked.prompts, config.unlabelled)
            _ = self.answers

    def _encoded(self, rows: Mapping[str, Sequence[Row]], place: str) -> dict[str, ExampleSet]:
        names = sorted(rows)
        return dict(zip(names, gather(
            partial(self.base.encode, name, rows[name], [
                f"{place}: row {i + 1} of task {name}" for i in range(len(rows[name]))
            ])
            for name in names
        )))  # fmt: skip


def _parts(sets: Sequence[ExampleSet]) -> list[ExampleSet]:
    """The sets and the parts that they are evaluated in."""
    return [part for one in sets for part in (one, *one.parts)]


def opening(inputs: Inputs) -> str:
    """One line that says what a run found, before its first stage."""
    capacity, ranks = inputs.capacity, [adapter.rank for adapter in inputs.adapters]
    budget = capacity.budget.text
    if capacity.max_bytes is not None:
        budget += f" = {size(capacity.max_bytes)}"
    elif capacity.budget.n_adapters:
        budget = f"{min(capacity.n_clusters, len(ranks))} of them"
    doras = ", ".join(
        f"{one.name} {one.dora_error:.3f}" for one in inputs.adapters if one.dora_error is not None
    )
    return (
        f"found {len(ranks)} adapters of {inputs.base.name} (rank {span(ranks)},"
        f" {size(capacity.total)}), {_rows(inputs)}; room for {budget}; device: {device_name()}"
        + (f"; DoRAs as LoRAs, relative error of dW: {doras}" if doras else "")
    )


def _rows(inputs: Inputs) -> str:
    if not inputs.tasks:
        return "no rows, so weights alone decide and no loss is measured (--tasks DIR)"
    n_probe, n_test = (span([len(one.examples) for one in some])
                       for some in (inputs.probes, inputs.tests))  # fmt: skip
    of = " of the adapters' own answers" if inputs.config.answered else ""
    said = f"{n_probe} calibration and {n_test} held-out rows each{of}"
    if inputs.config.unlabelled and not inputs.config.answered:
        n_prompts = sum(map(len, inputs.asked.prompts.values()))
        said += f", and {n_prompts:,} prompts that the adapters answer"
    return said
