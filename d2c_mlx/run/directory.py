"""The directory of a run: where its artifacts are, and whether its inputs changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.sources import absolute_entries, local_entries
from d2c_mlx.models.resolve import model_files
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.records import outputs_hold, read_finish, write_finish
from d2c_mlx.utils.device import arithmetic, use_device, versions
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.files import fingerprint, read_text
from d2c_mlx.utils.parsing import read_yaml

__all__ = ["RunDirectory", "absolute", "changed_options", "snapshot", "without_plan"]

# Options that change no byte of a pack.
_BESIDE_THE_PACK = {
    "output", "test_examples", "baselines",
}  # fmt: skip


@dataclass(frozen=True)
class RunDirectory:
    """Paths and artifacts of one run; it loads no model and no adapter.

    Use it to look into a run; `session.Session` runs stages.

    Attributes:
        root: the directory, which may not exist yet.
    """

    root: Path

    def path(self, name: str) -> Path:
        """Path of an artifact, written or not: `pack`, `bench.json`, `adapters/<name>`."""
        return self.root / name

    def read(self, name: str) -> Any:  # noqa: ANN401  JSON is any
        """Content of a JSON artifact."""
        return json.loads(read_text(self.path(name)))

    def is_finished(self, config: RunConfig, stages: list[str]) -> bool:
        """True if these stages ran on the inputs of `config` and nothing changed since.

        Inputs are compared by path, size and time, so that no model has to be loaded; artifacts are
        compared by content. False proves nothing: each stage then compares its inputs by content.

        Args:
            config: options of the run.
            stages: names of the wanted stages.
        """
        finish = read_finish(self.root)
        return (
            finish is not None
            and set(stages) <= set(finish["stages"])
            and finish["inputs"] == snapshot(config)
            and outputs_hold(self.root, without_plan(stages) if self.copied else stages)
        )

    def remember_finish(self, config: RunConfig, stages: list[str], copied: bool) -> None:
        """Record finished stages, as `stages_of` names them, and their inputs for `is_finished`."""
        inputs = snapshot(config)
        if inputs is not None:
            write_finish(self.root, {"inputs": inputs, "stages": stages, "copied": copied})

    @property
    def copied(self) -> bool:
        """True if a finished run copied all adapters instead of planning."""
        return (read_finish(self.root) or {}).get("copied") is True


def without_plan(stages: Iterable[str]) -> list[str]:
    """The stages of a run that copies all adapters instead of planning."""
    copying = {"plan": ("cluster", "merge")}
    return [one for name in stages for one in copying.get(name, (name,))]


def absolute(config: RunConfig) -> RunConfig:
    """The same options with absolute paths, so that `config.yaml` holds from any directory."""
    paths = {
        name: os.path.abspath(path)
        for name in ("tasks", "output", "model", "unlabelled", "clusters")
        if (path := os.path.expanduser(getattr(config, name) or ""))
        # A model that is no path is an id of the hub.
        and not os.path.isabs(path) and (name != "model" or os.path.exists(path))
    }  # fmt: skip
    return config.replace(adapters=absolute_entries(config.adapters), **paths)


def changed_options(config: RunConfig) -> list[str]:
    """Options of the run directory's pack that are others now, each `name: old, now new`.

    Empty where there is no pack, or no change of it.
    """
    output = Path(config.output)
    if not (output / "pack" / MANIFEST).is_file() or not (output / "config.yaml").is_file():
        return []
    old = read_yaml(output / "config.yaml")
    new = absolute(config).to_dict()
    return [
        f"{name}: {old[name]!r}, now {value!r}"
        for name, value in new.items()
        if name in old and old[name] != value and name not in _BESIDE_THE_PACK
    ]


def snapshot(config: RunConfig) -> str | None:
    """Hex SHA-256 of options, software, device, and path, size and times of every input file.

    Equal snapshots mean that nothing changed. Different ones only make the stages compare content.

    Returns:
        None if an input is on the hub, whose revision only a request can tell.
    """
    model, adapters = model_files(config.model), local_entries(config.adapters)
    if model is None or adapters is None:
        return None
    use_device()
    options = {k: value for k, value in absolute(config).to_dict().items() if k != "output"}
    paths = [*model, *adapters]
    paths += [Path(one) for one in (config.tasks, config.unlabelled, config.clusters) if one]
    # The user may have put a phone result there for the report.
    paths.append(Path(config.output) / "phone.json")
    software = [VERSION, versions(), [*arithmetic().values()]]
    plugins = [one.identity for one in config.plugins]
    return fingerprint([*software, options, [_state(path) for path in paths], *plugins])


def _state(path: Path) -> list[Any]:
    """Path, size and time of a file, or of every file in a directory."""
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = (
            Path(folder) / name
            for folder, _, names in os.walk(path, followlinks=True)
            for name in names
        )
    found: list[list[Any]] = []
    for file in sorted(files):
        name = os.path.relpath(file, path)
        try:
            stat = file.stat()
        except OSError:
            found.append([name, None])
        else:
            found.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return [os.path.realpath(path), found]
