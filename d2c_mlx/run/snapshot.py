"""A fingerprint of a run's inputs, taken without reading their content."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.sources import local_entries
from d2c_mlx.models.resolve import model_files
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import arithmetic, use_device, versions
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.files import fingerprint

__all__ = ["snapshot"]


def snapshot(config: RunConfig) -> str | None:
    """Hex SHA-256 of options, software, device, and path, size and time of every input file.

    Equal snapshots mean that nothing changed. Different ones only make the stages compare content.

    Returns:
        None if an input is on the hub, whose revision only a request can tell.
    """
    model, adapters = model_files(config.model), local_entries(config.adapters)
    if model is None or adapters is None:
        return None
    use_device()
    options = {name: value for name, value in config.to_dict().items() if name != "output"}
    paths = [*model, *adapters, Path(config.tasks)]
    if config.unlabelled:
        paths.append(Path(config.unlabelled))
    # The user may have put a phone result there for the report.
    paths.append(Path(config.output) / "phone.json")
    return fingerprint(
        [VERSION, versions(), arithmetic(), options, [_state(path) for path in paths]]
    )


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
        try:
            stat = file.stat()
        except OSError:
            found.append([str(file), None, None])
        else:
            found.append([str(file), stat.st_size, stat.st_mtime_ns])
    return [os.path.realpath(path), found]
