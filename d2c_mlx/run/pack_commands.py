"""From directories and prompts to a pack that changes: what `add` and `route` do, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.sources import find_adapters, read_adapters
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.resolve import resolve_exact_base
from d2c_mlx.models.tasks import common_system, load_tasks
from d2c_mlx.models.tokenize import encode_probes, encode_prompts
from d2c_mlx.packs.judge import Judge
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.packs.update import Arrival, add_adapter, opened
from d2c_mlx.run.inputs import CUTS
from d2c_mlx.run.records import keep_pack
from d2c_mlx.serve.router import fit_router, load_router, prompt_states, save_router
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import AdapterError, PackError, TaskError
from d2c_mlx.utils.files import hash_tree

__all__ = ["arrive", "route_prompts"]


def arrive(
    pack: Path,
    adapter: str,
    tasks: Path | None = None,
    n_probe: int = 10,
    model: str | None = None,
    budget: str | None = None,
) -> Arrival:
    """Read an adapter and add it to a pack, see `living.add_adapter`.

    Args:
        pack: directory of the pack.
        adapter: an entry as `sources.find_adapters` takes it; the task is called as the adapter.
        tasks: `<task>/probe.jsonl` of the new task, and of those that have a say.
        n_probe: rows of probe.jsonl that decide.
        model: the pack's base model, see `locate.resolve_model`.
        budget: see `add_adapter`.

    Raises:
        InputError: every problem of pack, adapter, tasks and budget; nothing is written.
    """
    with opened(pack) as found:
        sources = find_adapters(adapter, "ADAPTER")
        if len(sources) > 1:
            raise AdapterError(f"{adapter}: holds {len(sources)} adapters, expected one at a time")
        base = _base_of(found, model)
        (new,) = read_adapters(sources, base.module_shapes, base.config)
        judge = None
        if tasks:
            probes = _probes(base, tasks, new.name, found.tasks, n_probe)
            cache = LossCache(cache_directory() / "losses.sqlite")
            judge = Judge(base, Evaluator(Engine(base), cache), probes)
        return add_adapter(found, new, budget=budget, judge=judge)


def route_prompts(
    pack: Path,
    prompts: Sequence[str],
    tasks: Path | None = None,
    n_probe: int = 10,
    model: str | None = None,
    top: int = 3,
) -> list[dict[str, Any]]:
    """Which task of a pack each prompt is of.

    Args:
        pack: directory of the pack.
        prompts: what a user says, each a conversation of its own.
        tasks: fit the router first, on `<task>/probe.jsonl` of all tasks of the pack.
        n_probe: rows of probe.jsonl.
        model: the pack's base model, see `locate.resolve_model`.
        top: matches listed.

    Returns:
        For each prompt `prompt`, `task` (None: the base model) and `matches`, best first.

    Raises:
        InputError: no such pack or model, problems of tasks, or no router and no `tasks`.
        D2CError: the router is to be fitted, and another process is at work on the pack.
    """
    # Who only reads neither waits for others nor keeps them out.
    with opened(pack) if tasks else nullcontext(load_pack(pack)) as found:
        base = _base_of(found, model)
        if tasks:
            own = load_tasks(tasks, sorted(found.tasks), tests=False)
            probes = encode_probes(base.encode, own, n_probe)
            before = hash_tree(found.path)
            found = save_router(found, fit_router(base.model, probes, common_system(own)))
            keep_pack(found.path.resolve(), before)
    router = load_router(found)
    if router is None:
        raise PackError(f"{pack}: has no router; fit one with d2c-mlx route {pack} --tasks DIR")
    if not prompts:
        return []
    asked = encode_prompts(base.tokenizer, prompts, router.system)
    states = prompt_states(base.model, asked, router.n_blocks)
    result = []
    for prompt, state in zip(prompts, states):
        best = router.best(state)
        result.append({
            "prompt": prompt,
            "task": best and best.task,
            "matches": [asdict(one) for one in router.matches(state, top)],
        })  # fmt: skip
    return result


def _base_of(pack: Pack, model: str | None) -> BaseModel:
    """The pack's base model; ModelError if it is another."""
    return BaseModel(str(resolve_exact_base(pack.manifest["base"], model)))


def _probes(
    base: BaseModel, directory: Path, new: str, tasks: Mapping[str, object], n: int
) -> dict[str, ExampleSet]:
    """Of the new task, and of those in the pack that have a directory."""
    if not (directory / new).is_dir():
        raise TaskError(
            f"{directory / new}: no such directory; expected probe.jsonl of the new task"
        )
    names = sorted({new, *(task for task in tasks if (directory / task).is_dir())})
    encoded = encode_probes(base.encode, load_tasks(directory, names, tests=False), n)
    return {one.task: one.cut(*CUTS) for one in encoded}
