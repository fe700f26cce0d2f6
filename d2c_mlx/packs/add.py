"""Add the adapter of a new task to a pack, within its budget.

    d2c-mlx add PACK loras/gec-nl --tasks tasks

In a plain pack an arrival gets a slot of its own while one is free. Then it is merged into the slot
that suits it (K-Merge, https://arxiv.org/abs/2510.13537). In a compact pack it is stored in an
equal share of the bytes, and the components that the other adapters need least make room: merging
unlike adapters costs more than lower precision does (docs/concepts/byte-plans.md).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter, zeros
from d2c_mlx.adapters.checks import BaseWeights, base_name, read_config
from d2c_mlx.adapters.core_space import similarity
from d2c_mlx.adapters.reading import read_adapter, read_adapters
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.resolve import same_weights
from d2c_mlx.models.tasks import encode_probes, load_tasks, systems_of
from d2c_mlx.packs.make_room import Judge, make_room
from d2c_mlx.packs.manifest import MANIFEST, Manifest
from d2c_mlx.packs.pack import Pack
from d2c_mlx.packs.update import opened, read_stored, rewrite_compact
from d2c_mlx.packs.write import rewrite_pack
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import AdapterError, BudgetError, PackError, TaskError

__all__ = [
    "Arrival",
    "add_adapter",
    "add_from_path",
]


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
        base = BaseModel(str(before.base_directory(model)))
        own = BaseWeights(base.weight)
        is_base, bases = partial(same_weights, base.path), _base_names(before)
        (new,) = read_adapters(sources, base.module_shapes, base.config, is_base, own, bases)
        judge, system = None, None
        if tasks:
            if not (tasks / new.name).is_dir():
                raise TaskError(
                    f"{tasks / new.name}: no such directory; expected probe.jsonl of the new task"
                )
            names = {new.name, *(t for t in before.tasks if (tasks / t).is_dir())}
            rows = load_tasks(tasks, sorted(names), tests=False)
            encoded = encode_probes(base.encode, rows, n_probe)
            probes = {task.task: task.halved() for task in encoded}
            cache = LossCache(cache_directory() / "losses.sqlite")
            judge = Judge(base, Scorer(Engine(base), cache), probes)
            system = systems_of(rows).get(new.name)
        return add_adapter(before, new, budget=budget, judge=judge, system=system)


def _base_names(pack: Pack) -> list[str]:
    """The base model's names in a pack: that of the manifest, and those of its adapters.

    None where no adapter has one: that of the manifest may be a folder's.
    """
    keys = list(pack.adapters)
    named: list[str | None] = []
    if pack.storage == "plain":
        with pack.reading():
            named = [base_name(read_config(pack.path / str(key))) for key in keys]
    elif pack.storage == "compact" and keys:
        # All adapters of the file have one.
        named = [read_stored(pack, keys[:1])[0].base]
    names = [name for name in named if name]
    return [pack.manifest.model, *names] if names else []


def add_adapter(
    pack: Pack,
    adapter: Adapter,
    *,
    budget: str | None = None,
    judge: Judge | None = None,
    system: str | None = None,
) -> Arrival:
    """Add the adapter of a new task, named after it; the pack is replaced as a whole.

    Args:
        pack: what `load_pack` verified, held by `opened`.
        adapter: checked against the pack's base model.
        budget: as of `add_from_path`.
        judge: measures on calibration rows where an arrival fits best, and its form; None decides
            by weights.
        system: system message of all its calibration rows, see `Manifest.systems`.

    Raises:
        PackError: the task is there already.
        BudgetError: the budget has no room, whatever is merged or dropped.
    """
    name = adapter.name
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
    parsed, limit = _budget(pack, budget)
    # Its origin replaces that of an earlier task of the name.
    origins = {task: origin for task, origin in pack.manifest.origins.items() if task != name}
    update = {
        "budget": parsed.text,
        "max_bytes": limit,
        "origins": {**origins, **({name: adapter.origin} if adapter.origin else {})},
        "systems": {**pack.systems, **({} if system is None else {name: system})},
    }
    if pack.storage == "plain":
        about = pack.manifest.model_copy(update=update)
        return _into_slots(pack, adapter, about, parsed, judge)
    keys = list(pack.adapters)
    if parsed.n_adapters is not None and len(keys) >= parsed.n_adapters:
        raise BudgetError(
            f"budget: {parsed.text} adapters are in {pack.path} already, and a compact pack merges"
            " none; give bytes, or run the plan anew"
        )
    room = make_room(read_stored(pack, keys), adapter, limit, judge)
    tasks = {**pack.tasks, name: -1}
    changed = rewrite_compact(pack, keys, tasks, update, [*room.others, room.arrival])
    return Arrival(changed, name, len(keys), dropped=room.dropped, dropped_energy=room.energy)


def _budget(pack: Pack, text: str | None) -> tuple[Budget, int | None]:
    """The budget and its bytes; the bytes of a share are those that the pack stores."""
    if text is None:
        try:
            return parse_budget(pack.manifest.budget), pack.manifest.max_bytes
        except BudgetError as error:
            raise BudgetError(
                f"{pack.path / MANIFEST}: {error}; give another with --budget"
            ) from None
    budget = parse_budget(text)
    if budget.percent is not None:
        raise BudgetError(
            f"budget: {text!r} is a share of adapters that the pack does not hold; expected bytes,"
            ' such as "20MB", or a number of adapters'
        )
    return budget, budget.nbytes


def _into_slots(
    pack: Pack, adapter: Adapter, about: Manifest, budget: Budget, judge: Judge | None
) -> Arrival:
    """Give the arrival a slot of its own, or merge it into one."""
    limit = about.max_bytes
    if budget.n_adapters is not None and len(pack.adapters) > budget.n_adapters:
        raise BudgetError(
            f"budget: found {budget.text}, expected at least {len(pack.adapters)}: so many adapters"
            f" are in {pack.path}, and an arrival merges none of them; run it anew for fewer"
        )
    with pack.reading():
        slots = {str(key): read_adapter(pack.path / str(key)) for key in pack.adapters}
    counts = {slot: pack.merged(slot) for slot in slots}
    first = next(iter(slots))
    dtype = next(iter(slots[first].modules.values())).a.dtype
    n_layers = int(str(read_config(pack.path / first)["num_layers"]))
    new = adapter.uniform(dtype)
    alike = dict(zip(slots, similarity([*slots.values(), new])[-1]))
    fits = budget.n_adapters is None or len(slots) < budget.n_adapters
    # A router is dropped, so its bytes do not count.
    nbytes = sum(sum(pack.files_of(slot).values()) for slot in slots)
    fits &= limit is None or nbytes + new.nbytes(n_layers) <= limit
    if fits:
        name = next(free for k in count() if (free := f"cluster-{k}") not in slots)
        changed, counts[name] = new, 1
    else:
        ranks = _ranks_that_fit(pack, slots, new, n_layers, limit)
        closest = max(ranks, key=alike.__getitem__)
        merges = {}
        for slot in ranks if judge else [closest]:
            n = counts[slot]
            merges[slot] = merge_adapters(
                [slots[slot], new], rank=ranks[slot], weights=[n / (n + 1), 1 / (n + 1)]
            )
        name, merge = closest, merges[closest]
        if judge:
            name, merge = judge.best(merges, slots, pack.adapters, new)
        changed = merge.uniform(dtype)
        counts[name] += 1
    tasks = {**pack.tasks, adapter.name: name}
    about = about.model_copy(update={"n_layers": n_layers, "merged": counts, "tasks": tasks})
    now = rewrite_pack(pack, {name: changed}, about)
    most = float(max(alike.values()))
    return Arrival(now, adapter.name, name, tuple(pack.adapters.get(name, ())), most)


def _ranks_that_fit(
    pack: Pack, slots: Mapping[str, Adapter], new: Adapter, n_layers: int, limit: int | None
) -> Mapping[str, int | None]:
    """Slot -> the largest rank at which the arrival may be merged into it, at most its own.

    A merge has the modules of both, so at the rank of the slot it may be larger than that was.
    Slots where rank 1 is too large are left out; without a limit, None stands for any rank.

    Raises:
        BudgetError: it is too large in every slot.
    """
    if limit is None:
        return dict.fromkeys(slots)
    sizes = {slot: sum(pack.files_of(slot).values()) for slot in slots}
    dtype = next(iter(new.modules.values())).a.dtype
    ranks, least = {}, []
    for slot, old in slots.items():
        # Bytes of a merge depend on shapes, and on the longer name of a base.
        shapes = {path: lora.shape for half in (old, new) for path, lora in half.modules.items()}
        base = max(old.base, new.base, key=lambda name: len(json.dumps(name)))

        def nbytes(rank: int, shapes: Any = shapes, base: str | None = base) -> int:  # noqa: ANN401
            return Adapter(new.name, zeros(shapes, rank, dtype), base).nbytes(n_layers)

        room = limit - sum(sizes.values()) + sizes[slot]
        if rank := bisect_right(range(1, old.rank + 1), room, key=nbytes):
            ranks[slot] = rank
        least.append(limit - room + nbytes(1))
    if not ranks:
        raise BudgetError(
            f"budget: found {limit:,} bytes, expected at least {min(least):,}: so many take the"
            f" adapters in {pack.path} with {new.name!r} merged into one at rank 1; give more, or"
            " remove a task"
        )
    return ranks
