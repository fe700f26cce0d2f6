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
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter, zeros
from d2c_mlx.adapters.checks import BaseWeights, base_name, read_config
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.reading import read_adapters, warn_of_other_base
from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import CUTS, Evaluator
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.resolve import same_weights
from d2c_mlx.models.tasks import Task, encode_probes, load_tasks, systems_of
from d2c_mlx.packs.judge import Judge
from d2c_mlx.packs.make_room import make_room
from d2c_mlx.packs.pack import COMPACT, MANIFEST, Pack, PackInfo
from d2c_mlx.packs.update import opened
from d2c_mlx.packs.write import rewrite_pack, write_compact_pack
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import AdapterError, BudgetError, PackError, TaskError

__all__ = ["AddOptions", "Arrival", "add_adapter", "add_from_path"]


@dataclass(frozen=True)
class AddOptions:
    """Options of `add_from_path`.

    Attributes:
        tasks: directory with `<task>/probe.jsonl` for the new task, and for those in the pack
            whose losses count; None decides by weights alone.
        n_probe: calibration rows per task, the first of probe.jsonl.
        model: the pack's base model, as for `resolve_model`.
        budget: budget in bytes or adapters; None keeps the pack's own.
    """

    tasks: Path | None = None
    n_probe: int = 10
    model: str | None = None
    budget: str | None = None


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


def add_from_path(pack: Path, adapter: str, options: AddOptions | None = None) -> Arrival:
    """Read an adapter, check it against the pack's base model and add it, see `add_adapter`.

    An adapter whose config names another base model gets an `InputWarning`.

    Args:
        pack: directory of the pack.
        adapter: an entry as `find_adapters` takes it; the task is called as the adapter.
        options: how it is added.

    Raises:
        InputError: every problem of pack, adapter, tasks and budget; nothing is written.
        D2CError: another process is at work on the pack.
    """
    options = options or AddOptions()
    with opened(pack) as found:
        sources = find_adapters(adapter, "ADAPTER")
        if len(sources) > 1:
            raise AdapterError(f"{adapter}: holds {len(sources)} adapters, expected one at a time")
        base = BaseModel(str(found.base_directory(options.model)))
        own = BaseWeights(base.weight)
        (new,) = read_adapters(sources, base.module_shapes, base.config, base=own)
        is_base = partial(same_weights, base.path)
        warn_of_other_base(new, sources[0], _base_names(found), is_base)
        judge, system = None, None
        if options.tasks:
            tasks = _tasks(options.tasks, new.name, found.tasks)
            encoded = encode_probes(base.encode, tasks, options.n_probe)
            probes = {one.task: one.cut(*CUTS) for one in encoded}
            cache = LossCache(cache_directory() / "losses.sqlite")
            judge = Judge(base, Evaluator(Engine(base), cache), probes)
            system = systems_of(tasks).get(new.name)
        return add_adapter(found, new, budget=options.budget, judge=judge, system=system)


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
        with pack.reading([COMPACT]):
            named = [read_compact(pack.path / COMPACT, int(keys[0])).base]
    names = [name for name in named if name]
    return [pack.manifest.base.model, *names] if names else []


def _tasks(directory: Path, new: str, tasks: Mapping[str, object]) -> list[Task]:
    """Calibration rows of the new task, and of those in the pack that have a directory."""
    if not (directory / new).is_dir():
        raise TaskError(
            f"{directory / new}: no such directory; expected probe.jsonl of the new task"
        )
    names = sorted({new, *(task for task in tasks if (directory / task).is_dir())})
    return load_tasks(directory, names, tests=False)


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
        budget: see `AddOptions`.
        judge: measures on calibration rows where an arrival fits best, and its form; None decides
            by weights.
        system: system message of all its calibration rows, see `PackInfo.systems`.

    Raises:
        PackError: the task is there already.
        BudgetError: the budget has no room, whatever is merged or dropped.
    """
    if adapter.name in pack.tasks:
        raise PackError(
            f"{pack.path}: task {adapter.name!r} is there already; take it out first:"
            f" d2c-mlx remove {pack.path} {adapter.name}"
        )
    if pack.storage == "gguf":
        raise PackError(
            f"{pack.path}: a pack of GGUF files is planned as a whole; put {adapter.name} beside"
            " the other adapters and give d2c-mlx run --format gguf again"
        )
    rules = _Rules(*_budget(pack, budget), judge, system)
    if pack.storage == "plain":
        return _into_slots(pack, adapter, rules)
    return _into_bytes(pack, adapter, rules)


@dataclass(frozen=True)
class _Rules:
    """The budget, its bytes, and the other arguments of `add_adapter`."""

    budget: Budget
    limit: int | None
    judge: Judge | None
    system: str | None


def _budget(pack: Pack, text: str | None) -> tuple[Budget, int | None]:
    """The budget and its bytes; the bytes of a share are those that the pack stores."""
    if text is None:
        try:
            return parse_budget(pack.info.budget), pack.info.max_bytes
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


def _into_slots(pack: Pack, adapter: Adapter, rules: _Rules) -> Arrival:
    budget, limit, judge = rules.budget, rules.limit, rules.judge
    if budget.n_adapters is not None and len(pack.adapters) > budget.n_adapters:
        raise BudgetError(
            f"budget: found {budget.text}, expected at least {len(pack.adapters)}: so many adapters"
            f" are in {pack.path}, and an arrival merges none of them; run it anew for fewer"
        )
    with pack.reading():
        held = {str(key): load_adapter(pack.path / str(key)) for key in pack.adapters}
    n: dict[str | int, int] = {slot: pack.merged(slot) for slot in held}
    first = next(iter(held))
    dtype = next(iter(held[first].modules.values())).a.dtype
    n_layers = int(str(read_config(pack.path / first)["num_layers"]))
    new = adapter.uniform(dtype)
    alike = dict(zip(held, similarity([*held.values(), new])[-1]))
    most = max(alike.values())
    fits = budget.n_adapters is None or len(held) < budget.n_adapters
    # A router is dropped, so its bytes do not count.
    nbytes = sum(sum(pack.files_of(slot).values()) for slot in held)
    fits &= limit is None or nbytes + new.nbytes(n_layers) <= limit
    if fits:
        name = next(free for k in count() if (free := f"cluster-{k}") not in held)
        changed, n[name] = new, 1
    else:
        ranks = _ranks_that_fit(pack, held, new, n_layers, limit)
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
    info = replace(_info(pack, adapter, rules), n_layers=n_layers, merged=n)
    now = rewrite_pack(pack, {name: changed}, tasks, info)
    return Arrival(now, adapter.name, name, tuple(pack.adapters.get(name, ())), float(most))


def _ranks_that_fit(
    pack: Pack, held: Mapping[str, Adapter], new: Adapter, n_layers: int, limit: int | None
) -> Mapping[str, int | None]:
    """Slot -> the largest rank at which the arrival may be merged into it, at most its own.

    A merge has the modules of both, so at the rank of the slot it may be larger than that was.
    Slots where rank 1 is too large are left out; without a limit, None stands for any rank.

    Raises:
        BudgetError: it is too large in every slot.
    """
    if limit is None:
        return dict.fromkeys(held)
    sizes = {slot: sum(pack.files_of(slot).values()) for slot in held}
    dtype = next(iter(new.modules.values())).a.dtype
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
    """Bytes of a merge's files: they depend on shapes, and on the longer name of a base."""
    shapes = {path: lora.shape for one in (old, new) for path, lora in one.modules.items()}
    base = max(old.base, new.base, key=lambda name: len(json.dumps(name)))
    return Adapter(new.name, zeros(shapes, rank, dtype), base).nbytes(n_layers)


def _into_bytes(pack: Pack, adapter: Adapter, rules: _Rules) -> Arrival:
    budget, limit = rules.budget, rules.limit
    keys = [key for key in pack.adapters if isinstance(key, int)]
    if budget.n_adapters is not None and len(keys) >= budget.n_adapters:
        raise BudgetError(
            f"budget: {budget.text} adapters are in {pack.path} already, and a compact pack merges"
            " none; give bytes, or run the plan anew"
        )
    with pack.reading([COMPACT]):
        stored = [read_compact(pack.path / COMPACT, key) for key in keys]
    made = make_room(stored, adapter, limit, rules.judge)
    place = {key: i for i, key in enumerate(keys)}
    serves = {task: place[k] if isinstance(k, int) else None for task, k in pack.tasks.items()}
    merged: dict[str | int, int] = {place[key]: pack.merged(key) for key in keys}
    info = replace(_info(pack, adapter, rules), merged=merged)
    now = write_compact_pack(
        pack.path, [*made.others, made.arrival], serves | {adapter.name: len(keys)}, info
    )
    return Arrival(now, adapter.name, len(keys), dropped=made.dropped, dropped_energy=made.energy)


def _info(pack: Pack, adapter: Adapter, rules: _Rules) -> PackInfo:
    """What the manifest says with an arrival, whose origin replaces that of an earlier one."""
    info, name = pack.info, adapter.name
    origins = {task: origin for task, origin in info.origins.items() if task != name}
    if adapter.origin:
        origins[name] = adapter.origin
    system = {} if rules.system is None else {name: rules.system}
    return replace(info, budget=rules.budget.text, max_bytes=rules.limit, origins=origins,
                   systems={**info.systems, **system})  # fmt: skip
