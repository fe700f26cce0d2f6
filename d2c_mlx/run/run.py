"""A run: its options, its directory, and which of its stages are done.

Every stage leaves a record in `.stages/`: hashes of what it depended on and of what it wrote. So a
stage is repeated only if something changed, and a finished run is known without loading a model.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2c_mlx.adapters.sources import absolute_entries, local_entries
from d2c_mlx.models.resolve import model_files
from d2c_mlx.packs.manifest import MANIFEST, check_format
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.run.config import STAGES, RunConfig, stages_of
from d2c_mlx.utils.device import arithmetic, process_peak, use_device, versions
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import InputError, PackError
from d2c_mlx.utils.files import fingerprint, hash_tree, read_text, visible_files, write_json
from d2c_mlx.utils.parsing import json_or_none, read_yaml
from d2c_mlx.utils.progress import Progress

if TYPE_CHECKING:
    from d2c_mlx.compress.storage import Capacity
    from d2c_mlx.evaluate.distributed import Group
    from d2c_mlx.merge.library import Library
    from d2c_mlx.run.inputs import Inputs

__all__ = ["Run"]

# Options that change no byte of a pack.
_BESIDE_THE_PACK = {"output", "test_examples", "baselines"}
# Files of the packs that a run makes. A router is not among them, since it is added later.
_PACKED = re.compile(
    r"manifest\.json|compact\.safetensors|cluster-\d+\.gguf"
    r"|cluster-\d+/adapter(s\.safetensors|_config\.json)"
)
_NOT_DONE: dict[str, Any] = {"inputs": None, "outputs": {}}


class Run:
    """A config and a directory; `pipeline.run` makes one, or look into an earlier run with it.

    Attributes:
        config: options of the run.
        output: the directory, which may not exist yet.
        dry: True if no stage does anything.
        left: in a dry run, the stages so far that are not done.
    """

    def __init__(
        self,
        config: RunConfig,
        quiet: bool = True,
        group: Group | None = None,
        inputs: Inputs | None = None,
        dry: bool = False,
    ) -> None:
        """Make a run; nothing is read or loaded.

        Args:
            config: options of the run.
            quiet: show no progress.
            group: the ranks that share the evaluations; None is this process alone.
            inputs: read for these options already, as several runs share them.
            dry: only find out which stages have something to do.
        """
        self.config, self.output = config, Path(config.output)
        self._quiet, self._group = quiet, group
        self.dry, self.left = dry, list[str]()
        if inputs:
            self.inputs = inputs

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

        return read_inputs(self.config, Progress(not self._quiet), self._group)

    @cached_property
    def library(self) -> Library:
        """The library as far as the run's stages are done, once `pipeline.run` has ended."""
        from d2c_mlx.run.inputs import answered, converted, measured

        library = converted(self.inputs.library, self.path("adapters"))
        if self.path("answered").exists():
            library = answered(library, self.path("answered"))
        if library.tasks and self.path("losses.json").exists():
            library = measured(library, self.path("losses.json"))
        return library

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
        stages: list[str] = []
        for name in stages_of(self.config, until):
            if name == "plan" and self.inputs.holds_all:
                stages += ["cluster", "merge"]
            elif name != "answer" or self.inputs.prompts:
                stages.append(name)
        return stages

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
        read = {file: hash_tree(self.output / file) for file in reads}
        inputs = fingerprint([VERSION, key, [*read.values()]])
        old = _read_record(self._record(name))
        done = old["inputs"] == inputs and old["outputs"].keys() == set(writes)
        done = done and self._untouched(old["outputs"])
        if self.dry and (self.left or not done):
            # Every stage after one that is not done is to do.
            self.left.append(name)
        if done or self.dry:
            yield False
            return
        import mlx.core as mx

        started, scorer = time.monotonic(), self.inputs.library.scorer
        before = scorer.counts
        mx.reset_peak_memory()
        with scorer.progress.section(name):
            yield True
        outputs = {file: hash_tree(self.output / file) for file in writes}
        about = {
            "inputs": inputs,
            "read": read,
            "outputs": outputs,
            "seconds": round(time.monotonic() - started, 2),
            "evaluations": scorer.counts.since(before)._asdict(),
            "peak_nbytes": mx.get_peak_memory(),
            "process_peak_nbytes": process_peak(),
        }
        write_json(self._record(name), about)

    def finished(self, until: str = "report") -> bool:
        """True if every stage up to `until` is done and no input changed since.

        Inputs are compared by path, size and time, so that no model has to be loaded; artifacts are
        compared by content. False proves nothing: each stage then compares its inputs by content.

        Raises:
            ConfigError: the run has no such stage.
        """
        names, finish = stages_of(self.config, until), json_or_none(self._record("finish"))
        if not isinstance(finish, dict) or not isinstance(finish.get("stages"), list):
            return False
        if not set(names) <= set(finish["stages"]) or finish.get("inputs") != self._snapshot():
            return False
        last = max(STAGES.index("merge" if name == "plan" else name) for name in names)
        ran = [name for name in finish.get("ran", ()) if STAGES.index(name) <= last]
        outputs = [_read_record(self._record(name))["outputs"] for name in ran]
        return all(files and self._untouched(files) for files in outputs)

    def remember(self, until: str) -> None:
        """Record that all stages up to `until` are done, for `finished`."""
        snapshot = self._snapshot()
        if snapshot is not None:
            stages, ran = stages_of(self.config, until), self.stages(until)
            finish = {"inputs": snapshot, "stages": stages, "ran": ran}
            if json_or_none(self._record("finish")) != finish:
                write_json(self._record("finish"), finish)

    def _snapshot(self) -> str | None:
        """Hex SHA-256 of options, software, device, and path, size and times of every input file.

        Equal snapshots mean that nothing changed. None if an input is on the hub, whose revision
        only a request can tell.
        """
        config = self.config
        model, adapters = model_files(config.model), local_entries(config.adapters)
        if model is None or adapters is None:
            return None
        use_device()
        options = {k: v for k, v in self._absolute().to_dict().items() if k != "output"}
        paths = [*model, *adapters, *(Path(p) for p in (config.tasks, config.clusters) if p)]
        # The user may have put a phone result there for the report.
        paths.append(self.path("phone.json"))
        software = [VERSION, versions(), [*arithmetic().values()]]
        plugins = [plugin.identity for plugin in config.plugins]
        return fingerprint([*software, options, [_state(path) for path in paths], *plugins])

    def _absolute(self) -> RunConfig:
        """The same options with absolute paths, so that `config.yaml` holds from any directory."""
        config = self.config
        paths = {"output": config.output, "tasks": config.tasks, "clusters": config.clusters}
        paths = {name: os.path.abspath(path) for name, path in paths.items() if path}
        # A model that is no path is an id of the hub.
        if config.model and os.path.exists(model := os.path.expanduser(config.model)):
            paths["model"] = os.path.abspath(model)
        return config.replace(adapters=absolute_entries(config.adapters), **paths)

    def saved_options(self) -> dict[str, Any]:
        """The content of `config.yaml`."""
        return self._absolute().to_dict()

    def changed_options(self) -> list[str]:
        """Options of the pack that is there which are others now, each `name: old, now new`."""
        if not (self.path("pack") / MANIFEST).is_file() or not self.path("config.yaml").is_file():
            return []
        old = read_yaml(self.path("config.yaml"))
        return [
            f"{name}: {old[name]!r}, now {value!r}"
            for name, value in self.saved_options().items()
            if name in old and old[name] != value and name not in _BESIDE_THE_PACK
        ]

    def check_pack(self) -> None:
        """Check that `pack/` may be replaced: it is missing, or this run made it.

        A pack of the run's may be damaged; making it anew repairs it.

        Raises:
            PackError: the pack was made or changed otherwise, is of another version, or holds files
                of the user's, which would be lost.
        """
        path, record = self.path("pack"), _read_record(self._record("pack"))
        digests = {record["outputs"].get("pack"), record.get("expected")} - {None}
        files = [file.relative_to(path).as_posix() for file in visible_files(path)]
        if not files or hash_tree(path) in digests:
            return
        try:
            load_pack(path)
            damaged = False
        except InputError:
            ours = bool(digests) and all(map(_PACKED.fullmatch, files))
            damaged = ours and not _is_of_another_version(path)
        if not damaged:
            raise PackError(
                f"{path}: is not the pack that this run made, as after d2c-mlx add or remove, and"
                " would be made anew; move it elsewhere or delete it, then run again"
            )

    def expect_pack(self, directory: Path) -> None:
        """Record the pack in `directory`, which is about to replace `pack/`.

        The run may be killed between the replacement and the record of the stage.
        """
        record = self._record("pack")
        write_json(record, {**_read_record(record), "expected": hash_tree(directory)})

    def peaks(self) -> dict[str, int]:
        """Most bytes in any stage: `mlx`, which its evaluations held, and the `process`."""
        records = [_read_record(path) for path in _stages(self.output).glob("*.json")]
        keys = {"mlx": "peak_nbytes", "process": "process_peak_nbytes"}
        return {name: max((record.get(key, 0) for record in records), default=0)
                for name, key in keys.items()}  # fmt: skip

    def _record(self, name: str) -> Path:
        return _stages(self.output) / f"{name}.json"

    def _untouched(self, outputs: Mapping[str, str]) -> bool:
        return all(
            self.path(file).exists() and hash_tree(self.path(file)) == digest
            for file, digest in outputs.items()
        )


def _is_of_another_version(pack: Path) -> bool:
    """True if the manifest is readable JSON, but of a format or version that we do not know."""
    if json_or_none(pack / MANIFEST) is None:
        return False
    try:
        check_format(pack / MANIFEST)
    except PackError:
        return True
    return False


def _stages(output: Path) -> Path:
    """The directory of the records; a link would lead writes out of a run that somebody sent."""
    path = output / ".stages"
    if path.is_symlink():
        raise PackError(f"{path}: is a link, expected a directory; remove it")
    return path


def _read_record(path: Path) -> dict[str, Any]:
    """A record; a missing or damaged one counts as nothing done."""
    record = json_or_none(path)
    good = isinstance(record, dict) and "inputs" in record
    return record if good and isinstance(record.get("outputs"), dict) else _NOT_DONE


def _state(path: Path) -> list[Any]:
    """Path, size and time of a file, or of every file in a directory."""
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = (
            Path(folder) / name
            for folder, _, names in os.walk(path, followlinks=True)
            for name in names
        )
    states: list[list[Any]] = []
    for file in sorted(files):
        name = os.path.relpath(file, path)
        try:
            stat = file.stat()
            states.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        except OSError:
            states.append([name, None])
    return [os.path.realpath(path), states]
