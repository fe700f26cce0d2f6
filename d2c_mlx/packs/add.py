"""Add the adapter of a new task to a pack, within its budget.

    d2c-mlx add PACK loras/gec-nl --tasks tasks

In a plain pack an arrival gets a slot of its own while one is free. Then it is merged into the slot
that suits it (K-Merge, https://arxiv.org/abs/2510.13537). In a compact pack it is stored in an
equal share of the bytes, and the components that the other adapters need least make room: merging
unlike adapters costs more than lower precision does (docs/concepts/byte-plans.md).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import similarity
from d2c_mlx.adapters.reading import find_adapters, read_adapter, read_adapters
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.compress.compressed import Compressed, Level, dequantize
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.evaluate.distill import module_gains
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, LossTable, Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import encode_rows, load_tasks, systems_of
from d2c_mlx.packs.pack import Pack
from d2c_mlx.packs.write import opened, rewrite_pack
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import AdapterError, BudgetError, PackError
from d2c_mlx.utils.line_search import COARSE_SCALES, FINE_SCALES, line_search


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
    small = _arrival(list(others.values()), adapter, limit, scorer, rows.get(name))
    kept, dropped, energy = _make_room(list(others.values()), small, limit)
    new = max(others, default=-1) + 1
    stored = dict(zip([*others, new], [*kept, small]))
    changed = rewrite_pack(pack, {**pack.tasks, name: new}, stored, update)
    return Arrival(changed, name, n, dropped=dropped, dropped_energy=energy)


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
    own, limit = adapter.uniform(dtype), update["max_bytes"]
    alike = dict(zip(slots, similarity([*slots.values(), own])[-1]))
    # A router is dropped, so its bytes do not count.
    sizes = {slot: sum(pack.files_of(slot).values()) for slot in slots}

    def fits(arrival: Adapter, replaced: int = 0) -> bool:
        total = sum(sizes.values()) - replaced
        return limit is None or total + arrival.nbytes(pack.n_layers) <= limit

    if free and fits(own):
        name, new, n = next(f"cluster-{k}" for k in count() if f"cluster-{k}" not in slots), own, 1
    else:
        merges: dict[str, Adapter] = {}
        for slot in sorted(slots, key=alike.__getitem__, reverse=True):
            old, n = slots[slot], pack.merged(slot)
            rank = None if limit is None else old.rank
            merge = merge_adapters([old, own], rank=rank, weights=[n / (n + 1), 1 / (n + 1)])
            if fits(merge.uniform(dtype), sizes[slot]):
                merges[slot] = merge
            if merges and not scorer:
                break
        if not merges:
            raise BudgetError(
                f"budget: {limit:,} bytes have no room for {adapter.name!r} in {pack.path}, nor"
                " merged into one of its adapters; give more, or remove a task"
            )
        name, scale = next(iter(merges)), 1.0
        if scorer:
            costs = {
                slot: _cost(merge, slots[slot], own, [*pack.adapters[slot], own.name], scorer, rows)
                for slot, merge in merges.items()
            }
            name = min(costs, key=lambda slot: (costs[slot][1], slot))
            scale = costs[name][0]
        new, n = scaled(merges[name], scale).uniform(dtype), pack.merged(name) + 1
    tasks = {**pack.tasks, adapter.name: name}
    changed = rewrite_pack(pack, tasks, {name: new}, update, {name: n})
    joined = tuple(pack.adapters.get(name, ()))
    return Arrival(changed, adapter.name, name, joined, float(max(alike.values())))


def _cost(
    merge: Adapter,
    old: Adapter,
    new: Adapter,
    tasks: Sequence[str],
    scorer: Scorer,
    rows: Mapping[str, ExampleSet],
) -> tuple[float, float]:
    """The best scale of a merge of `old` and `new`, and what it costs there.

    A task's cost is the rise of its loss, as a share of its gain over the base before. The last of
    `tasks` is that of `new`; those without rows do not count.
    """
    sets = [rows[task] for task in tasks if task in rows]
    before, arrival, base = scorer.losses(
        [(old, sets[:-1]), (new, sets[-1:]), (None, sets)], in_parts=True
    )
    table = LossTable((), np.concatenate([before, arrival]), base)

    def cost(scale: float) -> float:
        (losses,) = scorer.losses([(scaled(merge, scale), sets)], in_parts=True)
        return float(table.regret(losses).sum())

    return line_search(cost, COARSE_SCALES)


def _arrival(
    others: Sequence[Compressed],
    adapter: Adapter,
    limit: int | None,
    scorer: Scorer | None,
    rows: ExampleSet | None,
) -> Compressed:
    """The arrival in an equal share of the bytes, or in the others' mean size without a limit.

    It takes fewer if a file of it alone would be over the limit.
    """
    share = sum(other.nbytes for other in others) / max(len(others), 1)
    if limit is not None:
        share = min(limit / (len(others) + 1), share or limit)
    parts = svd_components(adapter)
    gains = module_gains(scorer.engine.base, adapter, rows) if scorer and rows else {}
    values = worth(parts, [gains])
    widths = {path: sum(lora.shape) for path, lora in adapter.modules.items()}
    small = compress(adapter, allocate(values, widths, share), parts)
    while small.modules and limit is not None and compact_nbytes(index_of([small])) > limit:
        # The header and padding of its file are no part of the share.
        share *= 0.9
        small = compress(adapter, allocate(values, widths, share), parts)
    if not small.modules:
        raise BudgetError(
            f"budget: {share:,.0f} bytes, an equal share, hold no component of {adapter.name!r};"
            " give more, or remove a task"
        )
    if not scorer or not rows:
        return small

    def loss(scale: float) -> float:
        again = small.scaled(scale).adapter(scorer.engine.base.dtype)
        return float(scorer.losses([(again, [rows])], in_parts=True)[0][0])

    # The first scale from 1 up after which the loss rises.
    return small.scaled(line_search(loss, FINE_SCALES[FINE_SCALES.index(1.0) :], 1.0)[0])


def _make_room(
    others: Sequence[Compressed], arrival: Compressed, limit: int | None
) -> tuple[list[Compressed], int, float]:
    """Drop of `others` what they need least, until a file of all has at most `limit` bytes.

    Components at the same bits of a module are mixed in their rows, so they are dropped together or
    not at all; the rest keeps its codes, and nothing is rounded twice. The least energy per byte is
    dropped first, as a share of its adapter's energy. Also returns the number of components
    dropped, and the largest share of energy that an adapter lost.
    """
    pieces = []
    for k, other in enumerate(others):
        levels = [(path, level) for path, stored in other.modules.items() for level in stored]
        energies = []
        for _, level in levels:
            a, b = (x.astype(np.float64) for x in dequantize([[level.a], [level.b]]))
            # |a^T b|^2 in Frobenius norm.
            energies.append(float(np.sum((a @ a.T) * (b @ b.T))))
        total = sum(energies) or 1.0
        for (path, level), energy in zip(levels, energies):
            share = energy / total
            pieces.append((share / level.nbytes, k, path, level.bits, level.rank, share))
    pieces.sort()

    def without(n: int) -> list[Compressed]:
        """The others without the first `n` pieces."""
        gone = {piece[1:4] for piece in pieces[:n]}
        left = []
        for k, other in enumerate(others):
            modules: dict[str, tuple[Level, ...]] = {}
            for path, stored in other.modules.items():
                levels = tuple(level for level in stored if (k, path, level.bits) not in gone)
                modules |= {path: levels} if levels else {}
            left.append(replace(other, modules=modules))
        return left

    def nbytes(n: int) -> int:
        return compact_nbytes(index_of([*without(n), arrival]))

    n = 0
    if limit is not None:
        n = bisect_left(range(len(pieces)), -limit, key=lambda n: -nbytes(n))
    kept = without(n)
    emptied = any(old.modules and not new.modules for old, new in zip(others, kept))
    if emptied or (limit is not None and nbytes(n) > limit):
        raise BudgetError(
            f"budget: {limit or 0:,} bytes have no room for {len(others) + 1} adapters; give more,"
            " or remove a task"
        )
    lost = np.zeros(len(others))
    for *_, k, _, _, _, share in pieces[:n]:
        lost[k] += share
    return kept, sum(piece[4] for piece in pieces[:n]), float(np.max(lost, initial=0))
