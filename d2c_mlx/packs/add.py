"""Add the adapter of a new task to a pack, within its budget.

    d2c-mlx add PACK loras/gec-nl --tasks tasks

In a plain pack an arrival gets a slot of its own while one is free. Then it is merged into the slot
that suits it (K-Merge, https://arxiv.org/abs/2510.13537). In a compact pack it is stored in an
equal share of the bytes, and the components that the other adapters need least make room: merging
unlike adapters costs more than lower precision does (docs/concepts/byte-plans.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import similarity
from d2c_mlx.adapters.reading import find_adapters, read_adapter, read_adapters
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, LossTable, Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import encode_rows, load_tasks, systems_of
from d2c_mlx.packs.make_room import make_room
from d2c_mlx.packs.pack import Pack
from d2c_mlx.packs.write import opened, rewrite_pack
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import AdapterError, BudgetError, PackError
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

__all__ = ["Arrival", "add_adapter", "add_from_path"]


@dataclass(frozen=True)
class Arrival:
    """The place of an adapter that was added.

    Attributes:
        pack: the changed pack.
        task: the new task.
        adapter: the adapter that serves the new task, as in `Pack.tasks`.
        joined: other tasks that this adapter serves; empty if it is the arrival's own.
        similarity: largest cosine of dW with an adapter of the pack; None in compact packs.
        dropped: number of components of other adapters dropped to make room, in compact packs.
        dropped_energy: largest share of one adapter's energy that was dropped.
    """

    pack: Pack
    task: str
    adapter: str | int
    joined: tuple[str, ...] = ()
    similarity: float | None = None
    dropped: int = 0
    dropped_energy: float = 0.0


def add_from_path(
    pack: Path,
    adapter: str,
    *,
    tasks: Path | None = None,
    n_probe: int = 10,
    model: str | None = None,
    budget: str | None = None,
) -> Arrival:
    """Read an adapter, check it against the pack's base model and add it, see `add_adapter`.

    An adapter whose config names another base model gets an `InputWarning`.

    Args:
        pack: directory of the pack.
        adapter: an entry as `find_adapters` takes it; the task is called as the adapter.
        tasks: directory with `<task>/probe.jsonl` for the new task, and for those in the pack
            whose losses count; None decides by weights alone.
        n_probe: calibration rows per task, the first of probe.jsonl.
        model: the pack's base model, as for `resolve_model`.
        budget: budget in bytes or adapters; None keeps the pack's own.

    Raises:
        InputError: every problem of pack, adapter, tasks and budget; nothing is written.
        D2CError: another process is at work on the pack.
    """
    with opened(pack) as before:
        sources = find_adapters(adapter, "ADAPTER")
        if len(sources) > 1:
            raise AdapterError(f"{adapter}: holds {len(sources)} adapters, expected one at a time")
        base = Model(str(before.base_directory(model)))
        stored = [before.stored(served[0]) for served in before.adapters.values()]
        names = {other.base for other in stored if other and other.base}
        # The name in a manifest may be a folder's, where adapters have none.
        bases = [before.manifest.model, *names] if names else []
        (new,) = read_adapters(sources, base.module_shapes, base.config, expected=bases)
        if not tasks:
            return add_adapter(before, new, budget=budget)
        judging = {new.name, *(task for task in before.tasks if (tasks / task).is_dir())}
        loaded = load_tasks(tasks, sorted(judging), tests=False)
        encoded = encode_rows(base.encode, loaded, n_probe)
        return add_adapter(
            before,
            new,
            budget=budget,
            scorer=Scorer(Engine(base), LossCache(cache_directory() / "losses.sqlite")),
            rows={examples.task: examples.halved() for examples in encoded},
            system=systems_of(loaded).get(new.name),
        )


def add_adapter(
    pack: Pack,
    adapter: Adapter,
    *,
    budget: str | None = None,
    scorer: Scorer | None = None,
    rows: Mapping[str, ExampleSet] | None = None,
    system: str | None = None,
) -> Arrival:
    """Add the adapter of a new task, named after it; the pack is replaced as a whole.

    Args:
        pack: what `load_pack` verified, held by `opened`.
        adapter: checked against the pack's base model.
        budget: as of `add_from_path`.
        scorer: measures where an arrival fits best, and its form; None decides by weights.
        rows: task -> calibration rows that `scorer` judges by, of the new task at least.
        system: system message of all its calibration rows, see `Manifest.systems`.

    Raises:
        PackError: the task is there already.
        BudgetError: the budget has no room, whatever is merged or dropped.
    """
    name, rows = adapter.name, rows or {}
    if name in pack.tasks:
        raise PackError(
            f"{pack.path}: task {name!r} is there already; take it out first:"
            f" d2c-mlx remove {pack.path} {name}"
        )
    if pack.storage == "gguf":
        raise PackError(
            f"{pack.path}: a pack of GGUF files is planned as a whole; put {name} beside the other"
            " adapters and give d2c-mlx run --format gguf again"
        )
    parsed = parse_budget(budget or pack.manifest.budget)
    if budget and parsed.percent is not None:
        raise BudgetError(
            f"budget: {budget!r} is a share of adapters that the pack does not hold; expected"
            ' bytes, such as "20MB", or a number of adapters'
        )
    # The bytes of a share are those that the pack stores.
    limit = parsed.nbytes if budget else pack.manifest.max_bytes
    n, most = len(pack.adapters), parsed.n_adapters
    if most is not None and n >= most + (pack.storage == "plain"):
        raise BudgetError(
            f"budget: found {parsed.text}, and {pack.path} has {n} adapters, of which none are"
            " merged with each other; give more or bytes, or run the plan anew"
        )
    # Its origin replaces that of an earlier task of the name.
    origins = {task: origin for task, origin in pack.manifest.origins.items() if task != name}
    update = {
        "budget": parsed.text,
        "max_bytes": limit,
        "origins": {**origins, **({name: adapter.origin} if adapter.origin else {})},
        "systems": {**pack.manifest.systems, **({} if system is None else {name: system})},
    }
    if pack.storage == "plain":
        return _into_slots(pack, adapter, most is None or n < most, update, scorer, rows)
    others = pack.compressed()
    new = max(others, default=-1) + 1
    room = make_room([*others.values()], adapter, limit, scorer, rows.get(name))
    stored = dict(zip([*others, new], room.stored))
    changed = rewrite_pack(pack, {**pack.tasks, name: new}, stored, update)
    return Arrival(changed, name, n, dropped=room.dropped, dropped_energy=room.energy)


def _into_slots(
    pack: Pack,
    adapter: Adapter,
    free: bool,
    update: Mapping[str, Any],
    scorer: Scorer | None,
    rows: Mapping[str, ExampleSet],
) -> Arrival:
    """Give the arrival a slot of its own if one is free and has the bytes, or merge it into one."""
    with pack.reading():
        slots = {str(key): read_adapter(pack.path / str(key)) for key in pack.adapters}
    dtype = next(lora.a.dtype for old in slots.values() for lora in old.modules.values())
    new, limit = adapter.uniform(dtype), update["max_bytes"]
    alike = dict(zip(slots, similarity([*slots.values(), new])[-1]))
    # A router is dropped, so its bytes do not count.
    sizes = {slot: sum(pack.files_of(slot).values()) for slot in slots}

    def fits(arrival: Adapter, replaced: int = 0) -> bool:
        nbytes = 0 if limit is None else arrival.nbytes(pack.n_layers)
        return limit is None or sum(sizes.values()) - replaced + nbytes <= limit

    if free and fits(new):
        name, n = next(name for k in count() if (name := f"cluster-{k}") not in slots), 0
    else:
        merges: dict[str, Adapter] = {}
        for slot in sorted(slots, key=alike.__getitem__, reverse=True):
            old, n = slots[slot], pack.merged(slot)
            rank = None if limit is None else old.rank
            merge = merge_adapters([old, new], rank=rank, weights=[n / (n + 1), 1 / (n + 1)])
            if fits(merge.uniform(dtype), sizes[slot]):
                merges[slot] = merge
            if merges and not scorer:
                break
        if not merges:
            raise BudgetError(
                f"budget: {limit:,} bytes have no room for {adapter.name!r} in {pack.path}, nor"
                " merged into one of its adapters; give more, or remove a task"
            )
        name, new = next(iter(merges.items()))
        if scorer:
            name, new = _best(merges, slots, pack.adapters, adapter.uniform(dtype), scorer, rows)
        new, n = new.uniform(dtype), pack.merged(name)
    tasks, merged = {**pack.tasks, adapter.name: name}, {name: n + 1}
    changed = rewrite_pack(pack, tasks, {name: new}, update, merged)
    joined = tuple(pack.adapters.get(name, ()))
    return Arrival(changed, adapter.name, name, joined, float(max(alike.values())))


def _best(
    merges: Mapping[str, Adapter],
    slots: Mapping[str, Adapter],
    served: Mapping[str | int, Sequence[str]],
    new: Adapter,
    scorer: Scorer,
    rows: Mapping[str, ExampleSet],
) -> tuple[str, Adapter]:
    """The slot whose merge costs least, and that merge at its best scale.

    A task's cost is the rise of its loss, as a share of its gain over the base before. Tasks
    without rows do not count. `slots` are the adapters before, `merges` those with the new one
    merged in, and `served` the tasks of each.
    """

    def cost(
        merge: Adapter, sets: Sequence[ExampleSet], own: np.ndarray, base: np.ndarray, scale: float
    ) -> float:
        (losses,) = scorer.losses([(scaled(merge, scale), sets)], in_parts=True)
        return float(LossTable((), own, base).regret(losses).sum())

    costs = {}
    for slot, merge in merges.items():
        sets = [rows[task] for task in (*served[slot], new.name) if task in rows]
        before, arrival, base = scorer.losses(
            [(slots[slot], sets[:-1]), (new, sets[-1:]), (None, sets)], in_parts=True
        )
        own = np.concatenate([before, arrival])
        scale, lowest = line_search(partial(cost, merge, sets, own, base), COARSE_SCALES)
        costs[slot] = lowest, scale
    name = min(costs, key=lambda slot: (costs[slot][0], slot))
    return name, scaled(merges[name], costs[name][1])
