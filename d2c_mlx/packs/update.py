"""A pack that changes: an adapter arrives, tasks leave, the budget stays.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

In a plain pack an arrival gets a slot of its own while there is one, and then is merged into the
slot that suits it (K-Merge, https://arxiv.org/abs/2510.13537). In a compact pack it is stored in an
equal share of the bytes, and what the other adapters need least makes room: merging unlike adapters
costs more than bytes do (docs/planning.md).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter, zeros
from d2c_mlx.adapters.adapter_config import read_config
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.packs.judge import Judge
from d2c_mlx.packs.make_room import make_room
from d2c_mlx.packs.pack import COMPACT, MANIFEST, Pack, load_pack
from d2c_mlx.packs.write import rewrite_pack, write_compact_pack
from d2c_mlx.utils.errors import BudgetError, ConfigError, PackError
from d2c_mlx.utils.files import old_dir, restore_dir
from d2c_mlx.utils.lock import locked

__all__ = ["Arrival", "add_adapter", "list_pack", "opened", "remove_tasks"]


@dataclass(frozen=True)
class Arrival:
    """What became of an adapter.

    Attributes:
        pack: as it is now.
        task: the new one.
        adapter: that serves the new task, as in `Pack.tasks`.
        joined: tasks that it serves as well; none for an adapter of its own.
        similarity: largest cosine of dW with an adapter of the pack; None in compact packs.
        dropped: components of other adapters that made room, in compact packs.
        dropped_energy: the largest share of an adapter's energy that went with them.
    """

    pack: Pack
    task: str
    adapter: str | int
    joined: tuple[str, ...] = ()
    similarity: float | None = None
    dropped: int = 0
    dropped_energy: float = 0.0


@contextmanager
def opened(directory: Path) -> Iterator[Pack]:
    """A verified pack that no other process changes while the block runs.

    Raises:
        PackError: see `load_pack`; where there is no pack, nothing is made.
        D2CError: another process is at work on it.
    """
    path = directory.resolve()
    # A lock is a file in a directory that it makes, so not before there is something to hold.
    if not any((one / MANIFEST).is_file() for one in (path, old_dir(path))):
        load_pack(directory)
    advice = "it may replace the pack; wait for it, then give this command again"
    with locked(path.parent, advice=advice):
        # What a kill may have left of the last change.
        restore_dir(path)
        yield load_pack(directory)


def list_pack(pack: Pack) -> list[dict[str, Any]]:
    """Of every adapter: `adapter`, `tasks`, `merged` (adapters that are in it), `rank`, `nbytes`.

    Bytes are those of a plain adapter's files, or of a compact one's factors. Tasks that the base
    model serves come last, as adapter null.
    """
    rows: list[dict[str, Any]] = []
    for key, tasks in pack.adapters.items():
        if isinstance(key, int):
            stored = read_compact(pack.path / COMPACT, key)
            ranks = [sum(level.rank for level in levels) for levels in stored.modules.values()]
            rank, nbytes = max(ranks, default=0), stored.nbytes
        else:
            rank = load_adapter(pack.path / key).rank
            nbytes = sum(pack.files_of(key).values())
        rows.append({"adapter": key, "tasks": tasks, "merged": pack.merged(key),
                     "rank": rank, "nbytes": nbytes})  # fmt: skip
    bare = [task for task, key in pack.tasks.items() if key is None]
    if bare:
        rows.append({"adapter": None, "tasks": bare, "merged": 0, "rank": 0, "nbytes": 0})
    return rows


def remove_tasks(pack: Pack, tasks: Sequence[str]) -> Pack:
    """Remove tasks, and adapters that serve no other; the pack is replaced as a whole.

    A merge that serves other tasks stays as it is: what the removed task put into it cannot be
    taken out again.

    Raises:
        PackError: unknown tasks, or none would be left; the pack stays as it is.
    """
    unknown = sorted(set(tasks) - pack.tasks.keys())
    if unknown:
        raise PackError(
            f"{pack.path}: no task {', '.join(map(repr, unknown))}; it serves"
            f" {', '.join(pack.tasks)}"
        )
    left: dict[str, Any] = {t: key for t, key in pack.tasks.items() if t not in tasks}
    if not left:
        raise PackError(f"{pack.path}: no task would be left; delete the directory instead")
    budget = pack.manifest["budget"]
    text, limit = budget["text"], budget["nbytes"]
    kept = [key for key in pack.adapters if key in left.values()]
    merged: dict[Any, int] = {key: pack.merged(key) for key in kept}
    # What stays in a merge is still of there. Which merge a task was in that left earlier is not
    # known; once no adapter holds more than it serves, it was none of these.
    serving = Counter(left.values())
    orphans = any(n > serving[key] for key, n in merged.items())
    origins = {
        task: origin
        for task, origin in pack.origins.items()
        if task in left or (pack.tasks[task] in kept if task in pack.tasks else orphans)
    }
    if pack.storage == "plain":
        return rewrite_pack(pack, {}, left, merged, text, limit, origins=origins)
    stored = [read_compact(pack.path / COMPACT, key) for key in kept if isinstance(key, int)]
    place = {key: i for i, key in enumerate(kept)}
    serves = {task: None if key is None else place[key] for task, key in left.items()}
    return write_compact_pack(
        pack.path, stored, serves, merged={place[key]: n for key, n in merged.items()},
        budget=text, max_bytes=limit, origins=origins, **pack.about,
    )  # fmt: skip


def add_adapter(
    pack: Pack,
    adapter: Adapter,
    *,
    budget: str | None = None,
    threshold: float | None = None,
    judge: Judge | None = None,
) -> Arrival:
    """Add the adapter of a new task, named after it; the pack is replaced as a whole.

    Args:
        pack: what `load_pack` verified.
        adapter: checked against the pack's base model.
        budget: in bytes or adapters; None is the pack's own.
        threshold: open another slot only if all similarities are below it, from 0 to 1 (K-Merge++;
            0.02 to 0.03 there); None opens slots while there are any. Plain packs only.
        judge: measures on probes where an arrival fits best, and its form; None goes by weights.

    Raises:
        ConfigError: `threshold` is out of range.
        PackError: the task is there already, or `threshold` for a compact pack.
        BudgetError: the budget has no room, whatever is merged or dropped.
    """
    if adapter.name in pack.tasks:
        raise PackError(
            f"{pack.path}: task {adapter.name!r} is there already; take it out first:"
            f" d2c-mlx remove {pack.path} {adapter.name}"
        )
    # Cosines are at most 1, and below 0 hardly anything is: it would open no slot at all.
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"threshold: found {threshold}, expected a number from 0 to 1")
    allowed, limit = _budget(pack, budget)
    if pack.storage == "plain":
        return _into_slots(pack, adapter, allowed, limit, threshold, judge)
    if threshold is not None:
        raise PackError(f"{pack.path}: threshold is for plain packs, and this one is compact")
    return _into_bytes(pack, adapter, allowed, limit, judge)


def _budget(pack: Pack, text: str | None) -> tuple[Budget, int | None]:
    """The budget and its bytes; the pack's own is a share of adapters that are not here."""
    old = pack.manifest["budget"]
    if text is None:
        try:
            return parse_budget(old["text"]), old["nbytes"]
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
    pack: Pack,
    adapter: Adapter,
    budget: Budget,
    limit: int | None,
    threshold: float | None,
    judge: Judge | None,
) -> Arrival:
    if budget.n_adapters is not None and len(pack.adapters) > budget.n_adapters:
        raise BudgetError(
            f"budget: found {budget.text}, expected at least {len(pack.adapters)}: so many adapters"
            f" are in {pack.path}, and an arrival merges none of them; run it anew for fewer"
        )
    held = {str(key): load_adapter(pack.path / str(key)) for key in pack.adapters}
    n = {slot: pack.merged(slot) for slot in held}
    first, *_ = held.values()
    dtype = next(iter(first.modules.values())).a.dtype
    n_layers = int(str(read_config(pack.path / first.name)["num_layers"]))
    new = adapter.uniform(dtype)
    alike = dict(zip(held, similarity([*held.values(), new])[-1]))
    most = max(alike.values())
    fits = budget.n_adapters is None or len(held) < budget.n_adapters
    # Without its router, which is dropped.
    nbytes = sum(sum(pack.files_of(slot).values()) for slot in held)
    fits &= limit is None or nbytes + new.nbytes(n_layers) <= limit
    if fits and (threshold is None or most < threshold):
        name = next(free for k in count() if (free := f"cluster-{k}") not in held)
        changed, n[name] = new, 1
    else:
        ranks = _ranks_that_fit(pack, held, new, dtype, n_layers, limit)
        closest = max(ranks, key=alike.__getitem__)
        pairs = {
            slot: merge_adapters(
                [held[slot], new], rank=rank,
                weights=[n[slot] / (n[slot] + 1), 1 / (n[slot] + 1)],
            )
            for slot, rank in ranks.items() if judge or slot == closest
        }  # fmt: skip
        if judge:
            name, merge = judge.best(pairs, held, pack.adapters, new)
        else:
            (name, merge), *_ = pairs.items()
        changed = merge.uniform(dtype)
        n[name] += 1
    tasks: dict[str, Any] = {**pack.tasks, adapter.name: name}
    return Arrival(
        rewrite_pack(pack, {name: changed}, tasks, n, budget.text, limit, n_layers,
                     _origins(pack, adapter)),
        adapter.name, name, tuple(pack.adapters.get(name, ())), float(most),
    )  # fmt: skip


def _ranks_that_fit(
    pack: Pack, held: Mapping[str, Adapter], new: Adapter, dtype: mx.Dtype, n_layers: int,
    limit: int | None,
) -> Mapping[str, int | None]:  # fmt: skip
    """Slot -> the largest rank at which the arrival may be merged into it, at most its own.

    A merge has the modules of both, so at the rank of the slot it may be larger than that was.
    Slots where rank 1 is too large are left out; without a limit, None stands for any rank.

    Raises:
        BudgetError: it is in every slot.
    """
    if limit is None:
        return dict.fromkeys(held)
    sizes = {slot: sum(pack.files_of(slot).values()) for slot in held}
    found, least = {}, []
    for slot, old in held.items():
        nbytes = partial(_merged_nbytes, old, new, dtype, n_layers)
        room = limit - sum(sizes.values()) + sizes[slot]
        found[slot] = bisect_right(range(1, old.rank + 1), room, key=nbytes)
        least.append(limit - room + nbytes(1))
    fitting = {slot: rank for slot, rank in found.items() if rank}
    if not fitting:
        raise BudgetError(
            f"budget: found {limit:,} bytes, expected at least {min(least):,}: so many take the"
            f" adapters in {pack.path} with {new.name!r} merged into one at rank 1; give more, or"
            " remove a task"
        )
    return fitting


def _merged_nbytes(old: Adapter, new: Adapter, dtype: mx.Dtype, n_layers: int, rank: int) -> int:
    """Of the files of a merge: they depend on shapes alone, and on the longer name of a base."""
    shapes = {path: lora.shape for one in (old, new) for path, lora in one.modules.items()}
    base = max(old.base, new.base, key=lambda name: len(json.dumps(name)))
    return Adapter(new.name, zeros(shapes, rank, dtype), base).nbytes(n_layers)


def _into_bytes(
    pack: Pack, adapter: Adapter, budget: Budget, limit: int | None, judge: Judge | None
) -> Arrival:
    keys = [key for key in pack.adapters if isinstance(key, int)]
    if budget.n_adapters is not None and len(keys) >= budget.n_adapters:
        raise BudgetError(
            f"budget: {budget.text} adapters are in {pack.path} already, and a compact pack merges"
            " none; give bytes, or run the plan anew"
        )
    stored = [read_compact(pack.path / COMPACT, key) for key in keys]
    made = make_room(stored, adapter, limit, judge)
    place = {key: i for i, key in enumerate(keys)}
    serves = {task: place[k] if isinstance(k, int) else None for task, k in pack.tasks.items()}
    merged = {place[key]: pack.merged(key) for key in keys}
    now = write_compact_pack(
        pack.path, [*made.others, made.arrival], serves | {adapter.name: len(keys)},
        merged=merged, budget=budget.text, max_bytes=limit, origins=_origins(pack, adapter),
        **pack.about,
    )  # fmt: skip
    return Arrival(now, adapter.name, len(keys), dropped=made.dropped, dropped_energy=made.energy)


def _origins(pack: Pack, adapter: Adapter) -> dict[str, str]:
    """Of the pack with an arrival; not that of an earlier adapter of its name, still in a merge."""
    others = {task: origin for task, origin in pack.origins.items() if task != adapter.name}
    return others | ({adapter.name: adapter.origin} if adapter.origin else {})
