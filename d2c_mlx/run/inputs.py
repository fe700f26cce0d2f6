"""The inputs of a run, read and checked as a whole before anything is written."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import DoraBase
from d2c_mlx.adapters.reading import Source, find_adapters, read_adapter, read_adapters
from d2c_mlx.adapters.tensor_file import left_in_file
from d2c_mlx.cluster.partition import canonical
from d2c_mlx.compress.storage import Capacity
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.distributed import Group, local_ranks
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.merge.layerwise import check_blocks
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import READ_ANSWERS
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import Task, TaskRows, encode_task, load_task, load_tasks, spare_tasks
from d2c_mlx.packs.overwrite import check_run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import device_name
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ConfigError, InputError, collect, gather, warn
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.progress import Progress
from d2c_mlx.utils.templates import size, span


@dataclass(frozen=True)
class Inputs:
    """What a run is given.

    Attributes:
        config: options of the run.
        library: adapters as they were given, sorted by name, with their rows; prompts have
            stand-ins for the answers, see `answered`.
        capacity: bytes of the adapters and of the budget.
        clusters: the cluster of each adapter by `config.clusters`; None without.
    """

    config: RunConfig
    library: Library
    capacity: Capacity
    clusters: tuple[int, ...] | None

    @property
    def prompts(self) -> dict[str, TaskRows]:
        """Task -> rows, for tasks of which an adapter has to answer some."""
        return {task.name: task.rows for task in self.library.tasks if task.rows.asked}

    @property
    def holds_all(self) -> bool:
        """True if the bytes of the budget have room for all adapters as they are, in no GGUF."""
        most = self.capacity.max_bytes
        return self.config.format == "compact" and most is not None and most >= self.capacity.total


def read_inputs(
    config: RunConfig, progress: Progress | None = None, group: Group | None = None
) -> Inputs:
    """Read and check everything that a run is given; nothing is written.

    Raises:
        InputError: every problem of adapters, tasks and budget, one line each. If the base model
            cannot be loaded, its problem alone: the others must fit it.
        D2CError: another rank cannot load the base model.
    """
    base = Model(config.model)
    engine = Engine(base, n_processes=local_ranks())
    errors: list[InputError] = []
    sources = collect(errors, lambda: find_adapters(config.adapters)) or []
    dora = DoraBase(base.weight, config.accept_dora) if config.accept_dora else None
    read = partial(read_adapters, shapes=base.module_shapes, config=base.config, dora=dora)
    used = _usable(sources, read, config.tasks) if config.skip_bad else sources
    adapters = collect(errors, partial(read, used)) or []
    rows: list[TaskRows] = []
    if config.tasks:
        names, folder = [source.name for source in used], Path(config.tasks)
        rows = collect(errors, lambda: load_tasks(folder, names, prompts=True)) or []
        spare = spare_tasks(folder, [source.name for source in sources]) if not errors else []
        # Who lists adapters one by one leaves out others on purpose.
        if spare and all(source.folder for source in sources):
            warn(f"tasks: no adapter is called {', '.join(spare)}, so these rows are not used")
    merged = not config.budget.in_bytes and config.merge_method in READ_ANSWERS
    limits = config.probe_examples, config.test_examples or None, config.refine or merged
    # Rows of prompts end with a stand-in for the answer.
    encodings = [partial(encode_task, base.encode, task.used(*limits)) for task in rows]
    tasks = collect(errors, lambda: gather(encodings)) or []
    if config.refine:
        collect(errors, lambda: Distiller(base))
    for plugin in config.plugins:
        collect(errors, plugin.load)
    if config.merge_method == "layerwise":
        collect(errors, lambda: check_blocks(base))
    if tasks and not errors:
        collect(errors, lambda: _check_rows(engine, tasks))
    collect(errors, lambda: check_run(Path(config.output), sources, config.tasks, config.model))
    if adapters:
        capacity = Capacity(base, adapters, config.budget, config.merge_rank, config.format)
        if collect(errors, lambda: capacity.merge_rank) and config.budget.in_bytes:
            collect(errors, capacity.room)
    clusters = None
    if config.clusters and not errors:
        names, most = [adapter.name for adapter in adapters], capacity.n_clusters
        clusters = collect(errors, partial(_read_clusters, Path(config.clusters), names, most))
    if errors:
        raise InputError([line for error in errors for line in error.problems])
    scorer = Scorer(engine, LossCache(cache_directory() / "losses.sqlite"), progress, group)
    return Inputs(config, Library(adapters, tasks, scorer), capacity, clusters)


def _usable(
    sources: list[Source], read: Callable[[list[Source]], list[Adapter]], tasks: str | None
) -> list[Source]:
    """The sources that can be read and have rows, with a warning of the others; all if none can."""
    errors: dict[str, list[InputError]] = {source.name: [] for source in sources}
    for source in sources:
        collect(errors[source.name], partial(read, [source]))
        if tasks:
            load = partial(load_task, Path(tasks) / source.name, prompts=True)
            collect(errors[source.name], load)
    lines = [f"{name} ({told[0].problems[0]})" for name, told in errors.items() if told]
    if not 0 < len(lines) < len(sources):
        return sources
    warn(f"skip_bad: left out {len(lines)} of {len(sources)}: {'; '.join(lines)}")
    return [source for source in sources if not errors[source.name]]


def converted(library: Library, directory: Path) -> Library:
    """The library with the adapters that the stage `convert` wrote to `adapters/`."""
    adapters = [stored(directory / name) for name in library.names]
    return dataclasses.replace(library, adapters=adapters)


def stored(path: Path) -> Adapter:
    """An adapter of the run directory, its numbers left in the file."""
    return left_in_file(read_adapter(path), path)


def answered(library: Library, directory: Path) -> Library:
    """The library with the rows of `answered/`; ConfigError if an answer is out of memory."""
    encode = library.base.encode
    tasks = [
        encode_task(encode, task.rows.answered(directory / task.name)) if task.rows.asked else task
        for task in library.tasks
    ]
    _check_rows(library.scorer.engine, tasks)
    return dataclasses.replace(library, tasks=tasks)


def _check_rows(engine: Engine, tasks: Sequence[Task]) -> None:
    """Check that all rows fit the memory limit; ConfigError tells of the longest that does not."""
    sets = [rows for task in tasks for rows in task.sets]
    for rows in sorted(sets, key=lambda rows: -max(len(row.tokens) for row in rows.examples)):
        engine.batches(rows)


def opening(inputs: Inputs) -> str:
    """One line that says what a run found, before its first stage."""
    capacity, library = inputs.capacity, inputs.library
    budget = capacity.budget.text
    if capacity.max_bytes:
        budget += f" = {size(capacity.max_bytes)}"
    rows = "no rows, so weights alone decide and no loss is measured (--tasks DIR)"
    if library.tasks:
        probe, test = (
            [len(x.examples) for x in y] for y in (library.calibration, library.held_out)
        )
        rows = f"{span(probe)} calibration and {span(test)} held-out rows each"
    if inputs.prompts:
        rows += f", prompts of {len(inputs.prompts)} tasks among them, which the adapters answer"
    errors = [(adapter.name, adapter.dora_error) for adapter in library.adapters]
    doras = ", ".join(f"{name} {error:.3f}" for name, error in errors if error is not None)
    return (
        f"found {len(library.adapters)} adapters of {library.base.name} ({size(capacity.total)}),"
        f" {rows}; budget: {budget}; device: {device_name()}"
        + (f"; DoRAs as LoRAs, relative error of dW: {doras}" if doras else "")
    )


def _read_clusters(path: Path, names: Sequence[str], most: int) -> tuple[int, ...]:
    """Read the cluster of each adapter from `clusters.json` of a run or a list of lists of names.

    Raises:
        ConfigError: the file cannot be read, has not exactly these adapters, or too many clusters.
    """
    try:
        content = parse_json(read_text(path))
        if isinstance(content, dict):
            labels = content["methods"]["d2c"][0]["labels"]
            pairs = [(str(name), k) for name, k in zip(content["adapters"], labels, strict=True)]
        else:
            pairs = [(str(name), k) for k, cluster in enumerate(content) for name in cluster]
        n_clusters, count = len({k for _, k in pairs}), Counter(name for name, _ in pairs)
    except OSError as error:
        raise ConfigError(f"clusters: {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"clusters: {path}: expected clusters.json of a run, or a JSON list of lists of names"
        ) from None
    wrong = sorted(name for name, n in count.items() if name not in names or n > 1)
    missing = [name for name in names if name not in count]
    room = f"expected at most {most}, for which the budget has room"
    problems = [
        (wrong, f"{', '.join(wrong)}: no adapter, or there twice"),
        (missing, f"{', '.join(missing)}: in no cluster"),
        (n_clusters > most, f"found {n_clusters} clusters, {room}"),
    ]
    if lines := [f"clusters: {path}: {words}" for bad, words in problems if bad]:
        raise ConfigError(lines)
    label = dict(pairs)
    return canonical([label[name] for name in names])
