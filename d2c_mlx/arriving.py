"""An adapter on its way into a pack: read, checked against the base, judged by probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from d2c_mlx.budget import parse_budget
from d2c_mlx.cache import LossCache
from d2c_mlx.convert import read_adapter
from d2c_mlx.engine import Engine
from d2c_mlx.errors import ModelError, TaskError
from d2c_mlx.judge import Judge
from d2c_mlx.living import Arrival, add_adapter
from d2c_mlx.locate import cache_directory, resolve_base
from d2c_mlx.lock import locked
from d2c_mlx.model import BaseModel
from d2c_mlx.pack import load_pack
from d2c_mlx.probe import Evaluator
from d2c_mlx.tasks import ExampleSet, load_tasks
from d2c_mlx.workspace import CUTS

__all__ = ["arrive"]


def arrive(
    pack: Path,
    adapter: Path,
    task: str | None = None,
    tasks: Path | None = None,
    n_probe: int = 10,
    model: str | None = None,
    budget: str | None = None,
    threshold: float | None = None,
) -> Arrival:
    """Read an adapter directory and add it to a pack, see `living.add_adapter`.

    Args:
        pack: directory of the pack.
        adapter: directory of the adapter, PEFT or MLX.
        task: the new task; None is the directory's name.
        tasks: `<task>/probe.jsonl` and `test.jsonl` of the new task, and of those that have a say.
        n_probe: rows of probe.jsonl that decide.
        model: the pack's base model, see `locate.resolve_model`.
        budget: see `add_adapter`.
        threshold: see `add_adapter`.

    Raises:
        InputError: every problem of pack, adapter, tasks and budget; nothing is written.
    """
    with locked(pack.resolve().parent):
        found = load_pack(pack)
        if budget is not None:
            parse_budget(budget)
        about = found.manifest["base"]
        base = BaseModel(str(resolve_base(about["model"], model)[1]))
        if base.config_hash != about["config_sha256"]:
            raise ModelError(
                f"{base.path / 'config.json'}: is not the config of {about['model']!r}, which the"
                " pack was made with (its sha256 differs); name that model with --model"
            )
        new = replace(read_adapter(adapter, base.module_shapes), name=task or adapter.name)
        judge = None
        if tasks:
            probes = _probes(base, tasks, new.name, found.tasks, n_probe)
            cache = LossCache(cache_directory() / "losses.sqlite")
            judge = Judge(base, Evaluator(Engine(base), cache), probes)
        return add_adapter(found, new, budget=budget, threshold=threshold, judge=judge)


def _probes(
    base: BaseModel, directory: Path, new: str, tasks: Mapping[str, object], n: int
) -> dict[str, ExampleSet]:
    """Of the new task, and of those in the pack that have a directory."""
    if not (directory / new).is_dir():
        raise TaskError(
            f"{directory / new}: no such directory; expected probe.jsonl of the new task"
        )
    names = sorted({new, *(task for task in tasks if (directory / task).is_dir())})
    return {
        task.name: base.encode(task.name, task.probe[:n]).cut(*CUTS)
        for task in load_tasks(directory, names)
    }
