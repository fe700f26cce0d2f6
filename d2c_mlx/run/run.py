"""A run: its options, its directory, and which of its stages are done.

Every stage leaves a record in `.stages/`: hashes of what it depended on and of what it wrote. So a
stage is repeated only if something changed, and a finished run is known without loading a model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2c_mlx.adapters.reading import absolute_entries, local_entries
from d2c_mlx.models.resolve import model_files
from d2c_mlx.run.config import RANDOM_PARTITIONS, RunConfig, stages_of
from d2c_mlx.utils.device import arithmetic, process_peak, use_device, versions
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import (
    file_state,
    fingerprint,
    hash_tree,
    read_text,
    visible_files,
    write_json,
)
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.progress import Progress

if TYPE_CHECKING:
    from d2c_mlx.compress.storage import Capacity
    from d2c_mlx.evaluate.distributed import Group
    from d2c_mlx.merge.library import Library
    from d2c_mlx.run.inputs import Inputs

# Passes over the calibration rows, about, as measured. For a plan teacher targets take three, the
# gains of modules too, and four forms are rounded and measured about twice; a layer-wise merge runs
# the members and itself and then solves; the paper's loop measures about five partitions.
_PROBE, _PLAN, _LAYERWISE, _SEARCH, _PAPER = 4, 14, 4, 5, 20
# A step of refining runs forwards and backwards.
_STEP = 3
# A prompt is answered in about a hundred steps of twenty tokens, sixteen prompts at once.
_ANSWER = 125
# Held-out rows under the base, the adapters and the pack, and answers to a few of them.
_BENCH = 4


@dataclass(eq=False)
class Run:
    """A config and a directory; `pipeline.run` makes one, or look into an earlier run with it.

    Attributes:
        config: options of the run.
        quiet: show no progress.
        group: the ranks that share the evaluations; None is this process alone.
        dry: only find out which stages have something to do.
        left: in a dry run, the stages so far that are not done.
    """

    config: RunConfig
    quiet: bool = True
    group: Group | None = None
    dry: bool = False
    left: list[str] = field(default_factory=list, init=False)

    @property
    def output(self) -> Path:
        """The directory, which may not exist yet."""
        return Path(self.config.output)

    def path(self, name: str) -> Path:
        """Path of an artifact, written or not: `pack`, `bench.json`, `adapters/<name>`."""
        return self.output / name

    def read(self, name: str) -> Any:  # noqa: ANN401  JSON is any
        """Content of a JSON artifact: `bench.json`, `merges.json`."""
        return json.loads(read_text(self.path(name)))

    @cached_property
    def inputs(self) -> Inputs:
        """Everything that the run is given, read and checked once; raises as `read_inputs`."""
        from d2c_mlx.run.inputs import read_inputs

        return read_inputs(self.config, Progress(not self.quiet), self.group)

    @cached_property
    def library(self) -> Library:
        """The library as far as the run's stages are done, once `pipeline.run` has ended."""
        from d2c_mlx.evaluate.scorer import LossTable
        from d2c_mlx.run.inputs import answered, converted

        library = converted(self.inputs.library, self.path("adapters"))
        if self.path("answered").exists():
            library = answered(library, self.path("answered"))
        if library.tasks and self.path("losses.json").exists():
            library = library.measured(LossTable.from_json(self.read("losses.json")))
        return library

    @cached_property
    def expected_tokens(self) -> dict[str, float]:
        """Stage -> about how many tokens pass through the model; empty without rows."""
        from d2c_mlx.merge.merging import method_of
        from d2c_mlx.refine.refine import TrainOptions

        config, library = self.config, self.inputs.library
        n = len(library.names)
        if not library.tasks:
            return {}
        k = n if config.budget.in_bytes else self.capacity.n_clusters
        rows = sum(task.calibration.n_tokens for task in library.tasks)
        # Clusters are not known yet; in some of about equal size so many tasks are merged.
        learnt = sum(task.calibration_and_extra.n_tokens for task in library.tasks)
        merging: float = _LAYERWISE * learnt * min(n, 2 * (n - k)) / n
        # Each step of refining runs some rows of a task, and as many answers to prompts.
        training = TrainOptions()
        sets = [x for task in library.tasks for x in (task.calibration, task.extra) if x]
        step = sum(x.n_tokens * min(1, training.rows / len(x.examples)) for x in sets)
        n_partitions = sum(RANDOM_PARTITIONS if x == "random" else 1 for x in self.baselines)
        prompts = self.inputs.prompts.values()
        n_prompts = sum(len(x) for rows in prompts for x in rows.asked.values())
        held_out = sum(task.held_out.n_tokens for task in library.tasks)
        searching: float = (_PAPER if config.search == "paper" else _SEARCH) * rows
        if method_of(library, config.merging, quick=True) == "layerwise":
            # The search makes the merges that ship, of about two partitions.
            searching, merging = 2 * merging, 0.0
        return {
            "answer": _ANSWER * n_prompts,
            "probe": _PROBE * rows,
            "plan": _PLAN * rows,
            "cluster": searching if k < n else 0,
            "merge": merging,
            "refine": _STEP * training.steps * step if config.refine else 0,
            "bench": (_BENCH + config.refine + n_partitions) * held_out + n_partitions * merging,
        }

    @property
    def capacity(self) -> Capacity:
        """Sizes of the adapters, and what the budget has room for."""
        return self.inputs.capacity

    @property
    def planned(self) -> bool:
        """True if a plan chooses what is stored; False if adapters are merged, or copied."""
        return self.config.budget.in_bytes and not self.inputs.holds_all

    @property
    def baselines(self) -> tuple[str, ...]:
        """Partitions that bench merges too; none beside copies."""
        return () if self.config.budget.in_bytes else self.config.baselines

    def stages(self, until: str = "report") -> list[str]:
        """The stages of this run up to `until`, once its inputs are known.

        No adapter answers where no row lacks an answer, and a budget in bytes with room for all
        adapters is not planned: they are copied, as clusters of one.
        """
        instead = {"plan": ["cluster", "merge"]} if self.inputs.holds_all else {}
        instead |= {} if self.inputs.prompts else {"answer": []}
        return [x for name in stages_of(self.config, until) for x in instead.get(name, [name])]

    @contextmanager
    def stage(
        self, name: str, *, key: object, reads: Sequence[str] = (), writes: Sequence[str]
    ) -> Iterator[bool]:
        """Run a stage as the block, unless it is done; it is recorded if the block ends well.

        Args:
            name: name of the stage.
            key: everything that the outputs depend on besides `reads`, as a JSON value.
            reads: artifacts of earlier stages that the block reads.
            writes: artifacts that it writes.

        Yields:
            False if the stage ran on the same inputs before and its outputs are untouched, so that
            there is nothing to do.
        """
        read = {file: hash_tree(self.path(file)) for file in reads}
        inputs, old = fingerprint([VERSION, key, [*read.values()]]), self._record(name)
        done = old["inputs"] == inputs and old["outputs"].keys() == set(writes)
        done = done and self._untouched(old["outputs"])
        if done:  # A record says that a file is whole, and not who wrote it.
            from d2c_mlx.run.stages import is_sound

            done = all(is_sound(self.path(file), self.inputs.library.names) for file in writes)
        if self.dry and (self.left or not done):
            # Every stage after one that is not done is to do.
            self.left.append(name)
        if done or self.dry:
            yield False
            return
        import mlx.core as mx

        started, scorer = time.monotonic(), self.inputs.library.scorer
        before = scorer.counts.copy()
        mx.reset_peak_memory()
        stages = self.stages()
        place = f"{stages.index(name) + 1}/{len(stages)} {name}"
        with scorer.progress.section(place, self.expected_tokens.get(name, 0)):
            yield True
        record = {
            "inputs": inputs,
            "read": read,
            "outputs": {file: hash_tree(self.path(file)) for file in writes},
            "seconds": round(time.monotonic() - started, 2),
            "evaluations": {what: n - before[what] for what, n in scorer.counts.items()},
            "peak_nbytes": mx.get_peak_memory(),
            "process_peak_nbytes": process_peak(),
        }
        write_json(self._records / f"{name}.json", record)

    def finished(self, until: str = "report") -> bool:
        """True if every stage up to `until` is done and no input changed since.

        Inputs are compared by path, size and time, so that no model has to be loaded; artifacts are
        compared by content. False proves nothing: each stage then compares its inputs by content.

        Raises:
            ConfigError: the run has no such stage.
        """
        stages_of(self.config, until)
        match json_or_none(self._records / "finish.json"):
            case {"inputs": str(inputs), "stages": [*stages], "ran": [*ran]} if until in stages:
                outputs = (self._record(name)["outputs"] for name in ran)
                # No stranger knows the snapshot, so none has us read what his record names.
                ours = inputs == self.snapshot()
                return ours and all(files and self._untouched(files) for files in outputs)
        return False

    def remember(self, until: str) -> None:
        """Record that all stages up to `until` are done, for `finished`."""
        path, stages = self._records / "finish.json", stages_of(self.config, until)
        finish = {"inputs": self.snapshot(), "stages": stages, "ran": self.stages(until)}
        if json_or_none(path) != finish:
            write_json(path, finish)

    def snapshot(self) -> str | None:
        """Hex SHA-256 of options, software, device, and path, size and times of every input file.

        Equal snapshots mean that nothing changed. None if an input is on the hub, whose revision
        only a request can tell.
        """
        config = self.config
        model, adapters = model_files(config.model), local_entries(config.adapters)
        if model is None or adapters is None:
            return None
        use_device()
        # The user may have put a phone result there for the report.
        paths = [*model, *adapters, self.path("phone.json")]
        paths += [Path(path) for path in (config.tasks, config.clusters) if path]
        states = []
        for path in paths:
            walk = os.walk(path, followlinks=True)
            files = sorted(Path(folder) / name for folder, _, names in walk for name in names)
            for file in files if path.is_dir() else [path]:
                states.append([os.path.realpath(file), file.exists() and file_state(file)])
        software = [VERSION, versions(), [*arithmetic().values()]]
        plugins = [plugin.identity for plugin in config.plugins]
        return fingerprint([*software, {**self.saved_options(), "output": ""}, states, *plugins])

    def saved_options(self) -> dict[str, Any]:
        """The content of `config.yaml`; its paths are absolute, so it holds from any directory."""
        config, options = self.config, self.config.to_dict()
        paths = {name: options[name] for name in ("output", "tasks", "clusters") if options[name]}
        # A model that is no path is an id of the hub.
        if config.model and os.path.exists(model := os.path.expanduser(config.model)):
            paths["model"] = model
        options["adapters"] = absolute_entries(config.adapters)
        return options | {name: os.path.abspath(path) for name, path in paths.items()}

    def check_pack(self) -> None:
        """Check that `pack/` may be replaced: it is missing, or this run made it.

        Raises:
            PackError: the pack was made, changed or damaged otherwise, or holds files of the
                user's, which would be lost.
        """
        path, record = self.path("pack"), self._record("pack")
        digests = record["outputs"].get("pack"), record.get("expected")
        if visible_files(path) and hash_tree(path) not in digests:
            raise PackError(
                f"{path}: is not the pack that this run made, as after d2c-mlx add, remove or"
                " route, and would be made anew; move it elsewhere or delete it, then run again"
            )

    def expect_pack(self, directory: Path) -> None:
        """Record the pack in `directory`, which is about to replace `pack/`.

        The run may be killed between the replacement and the record of the stage.
        """
        record = {**self._record("pack"), "expected": hash_tree(directory)}
        write_json(self._records / "pack.json", record)

    def peaks(self) -> dict[str, int]:
        """Most bytes in any stage: `mlx`, which its evaluations held, and the `process`."""
        records = [self._record(path.stem) for path in self._records.glob("*.json")]
        keys = ("mlx", "peak_nbytes"), ("process", "process_peak_nbytes")
        return {x: max(n for r in records if isinstance(n := r.get(y, 0), int)) for x, y in keys}

    @property
    def _records(self) -> Path:
        """Directory of the records; a link would lead writes out of a run that somebody sent."""
        directory = self.path(".stages")
        if directory.is_symlink():
            raise PackError(f"{directory}: is a link, expected a directory; remove it")
        return directory

    def _record(self, name: str) -> dict[str, Any]:
        """The record of a stage; a missing or damaged one counts as nothing done."""
        match json_or_none(self._records / f"{name}.json"):
            case {"inputs": _, "outputs": {}} as record:
                return record
        return {"inputs": None, "outputs": {}}

    def _untouched(self, outputs: Mapping[str, str]) -> bool:
        return all((p := self.path(x)).exists() and hash_tree(p) == y for x, y in outputs.items())
