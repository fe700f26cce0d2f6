"""The directory of a run: where its artifacts are, and what is in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.records import outputs_hold, read_finish, write_finish
from d2c_mlx.run.snapshot import snapshot
from d2c_mlx.utils.files import read_text

__all__ = ["RunDirectory"]


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
            and outputs_hold(self.root, stages)
        )

    def remember_finish(self, config: RunConfig, stages: list[str]) -> None:
        """Record finished stages and their inputs for `is_finished`."""
        inputs = snapshot(config)
        if inputs is not None:
            write_finish(self.root, {"inputs": inputs, "stages": stages})
