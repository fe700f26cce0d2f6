"""Merging block by block: every module is asked for what the members' own modules say.

RegMean asks a module for the updates of its members on their inputs. But the blocks below are
merged too, and what comes out of them is no longer what a member would have. Here a part of that
is made up for: with inputs x under the merge and x_i under member i, a module's update dW is the
least squares solution, over all members, of

    x dW = x dW_i + strength * (x_i (W + dW_i) - x (W + dW_i))

At strength 0 it is RegMean++ (https://arxiv.org/abs/2508.03121), block by block as in its paper. It
is layer-wise distillation (ProDistill, https://arxiv.org/abs/2502.12706) in closed form, by the
targets of asymmetric calibration (GPTAQ, https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.batches import shared_prefix
from d2c_mlx.errors import ModelError
from d2c_mlx.examples import ExampleSet
from d2c_mlx.forward import blocks_are_exact, run_blocks
from d2c_mlx.inputs import Enough, TokenBatch, tapped, token_batches
from d2c_mlx.merge.core import Factors
from d2c_mlx.merge.data import Grams, matched
from d2c_mlx.model import BaseModel, block_index
from d2c_mlx.schedule import Workers

__all__ = ["STRENGTH", "check_blocks", "merge_layerwise"]

# To make up for all of it would be to trust a few rows.
STRENGTH = 0.75


@dataclass(frozen=True)
class _Part:
    """Some rows of a task on their way through the blocks."""

    task: int
    batch: TokenBatch
    hidden: mx.array

    @property
    def n_tokens(self) -> int:
        return self.batch.n_tokens


@dataclass(frozen=True)
class _Seen:
    """What a block did with a part; modules with the same input share one array."""

    hidden: mx.array
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


def check_blocks(base: BaseModel) -> None:
    """Raises ModelError if blocks that are run one at a time do not give what the model gives."""
    if not blocks_are_exact(base.model):
        raise ModelError(
            f"{base.name}: merge_method layerwise runs the model block by block, which gives"
            " something else with this architecture; take regmean++"
        )


def merge_layerwise(
    base: BaseModel,
    adapters: Sequence[Adapter],
    sets: Sequence[ExampleSet],
    rank: int | None = None,
    scale: float = 1.0,
    strength: float = STRENGTH,
    most: int | None = None,
    workers: Workers | None = None,
) -> Adapter:
    """Merge into one adapter; see the top of this file.

    Args:
        base: the model, as `check_blocks` wants it; no adapter stays attached.
        adapters: at least two, sorted by name.
        sets: examples of each.
        rank: most columns of every module of the result; None takes the largest of `adapters`.
        scale: of every update, which those above it take into account.
        strength: between 0 and 1.
        most: tokens of each set that are looked at, evenly spaced; None is all. Those that all rows
            of all members begin with are not.
        workers: what runs the model; None is this thread.

    Returns:
        float32 factors with scale 1, `scale` folded in, named after the members.
    """
    rank = rank or max(adapter.rank for adapter in adapters)
    merging = _Merging(base, adapters, rank, scale, strength, workers or Workers(1))
    blocks = _paths_of_blocks(adapters)
    # Below the first block that a member touches, all of them are the base model.
    own = mixed = merging.through(_parts(sets, most), range(min(blocks)))
    modules: dict[str, LoRA] = {}
    for block in range(min(blocks), max(blocks) + 1):
        paths = blocks.get(block, [])
        taught: list[_Seen] = []
        for i, adapter in enumerate(adapters):
            some = [part for part in own if part.task == i]
            taught += merging.see(some, block, _some(adapter, paths), paths)
        here: dict[str, LoRA] = {}
        for group in _by_input(taught[0]):
            seen = merging.see(mixed, block, _merge(here), group, last=group[-1])
            here |= merging.fitted(group, mixed, seen, taught)
        own = [replace(part, hidden=one.hidden) for part, one in zip(own, taught)]
        mixed = merging.through(mixed, [block], _merge(here))
        modules |= here
    base.attach(None)
    names = tuple(adapter.name for adapter in adapters)
    return Adapter("+".join(names), dict(sorted(modules.items())), adapters[0].base, names)


@dataclass(frozen=True)
class _Merging:
    """What `merge_layerwise` was asked for."""

    base: BaseModel
    adapters: Sequence[Adapter]
    rank: int
    scale: float
    strength: float
    workers: Workers

    def see(
        self,
        parts: Sequence[_Part],
        block: int,
        adapter: Adapter | None,
        paths: Sequence[str],
        last: str | None = None,
    ) -> list[_Seen]:
        """What a block does with every part, and its modules `paths` with the tokens to keep.

        With `last` it goes no further than that module, and leaves the parts where they are.
        """
        self.base.attach(adapter)
        with tapped(self.base.model, paths) as here:

            def one(part: _Part) -> _Seen:
                here.seen, here.said, here.last = {}, {}, last
                hidden = part.hidden
                with suppress(Enough):
                    hidden = run_blocks(self.base.model, hidden, first=block, stop=block + 1)
                mx.eval(hidden)
                inputs, outputs = map(part.batch.kept_of, (here.seen, here.said))
                return _Seen(hidden, inputs, outputs)

            found = dict(self.workers.run(lambda some: [one(part) for part in some], parts))
        return [found[i] for i in range(len(parts))]

    def through(
        self, parts: Sequence[_Part], blocks: Sequence[int], adapter: Adapter | None = None
    ) -> list[_Part]:
        """The parts after some blocks."""
        for block in blocks:
            seen = self.see(parts, block, adapter, ())
            parts = [replace(part, hidden=one.hidden) for part, one in zip(parts, seen)]
        return list(parts)

    def fitted(
        self,
        paths: Sequence[str],
        parts: Sequence[_Part],
        seen: Sequence[_Seen],
        taught: Sequence[_Seen],
    ) -> dict[str, LoRA]:
        """Modules of the merge that have the same input.

        Args:
            paths: of the modules.
            parts: rows of all members.
            seen: of each part, under the merge without these modules.
            taught: of each part, under its own member.
        """

        def by_task(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
            found: list[list[np.ndarray]] = [[] for _ in self.adapters]
            for part, x in zip(parts, arrays):
                found[part.task].append(x)
            return [np.concatenate(some) for some in found]

        def fit(path: str) -> Factors:
            bare = by_task(one.outputs[path] for one in seen)
            wanted = by_task(one.outputs[path] for one in taught)
            lacking = [
                self.strength * (y - (said + (x @ a) @ b))
                for y, said, x, (a, b) in zip(wanted, bare, tokens, factors[path])
            ]
            return matched(factors[path], grams, lacking, self.rank)

        tokens = by_task(one.inputs[paths[0]] for one in seen)
        factors = {path: [self._factors(one, path) for one in self.adapters] for path in paths}
        # As `merge_adapters` does it, and nothing of MLX, whose streams belong to a thread.
        with threadpool_limits(1), ThreadPoolExecutor(len(paths)) as pool:
            grams = Grams(tokens)
            found = dict(zip(paths, pool.map(fit, paths)))
        return {path: LoRA(mx.array(a), mx.array(self.scale * b)) for path, (a, b) in found.items()}

    def _factors(self, adapter: Adapter, path: str) -> Factors:
        """Of a module; without columns where the adapter does not have it."""
        if path in adapter.modules:
            return adapter.modules[path].factors()
        width, out = self.base.module_shapes[path]
        return np.zeros((width, 0), np.float32), np.zeros((0, out), np.float32)


def _parts(sets: Sequence[ExampleSet], most: int | None) -> list[_Part]:
    """All rows. What they all begin with is one input with an output for every member: not kept."""
    rows = tuple(row for one in sets for row in one.examples)
    skip = len(shared_prefix(ExampleSet("all", rows)))
    return [
        _Part(i, batch, mx.array(batch.tokens))
        for i, one in enumerate(sets)
        for batch in token_batches(one, most, skip)
    ]


def _paths_of_blocks(adapters: Sequence[Adapter]) -> dict[int, list[str]]:
    blocks: dict[int, list[str]] = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        blocks.setdefault(block_index(path), []).append(path)
    return blocks


def _some(adapter: Adapter, paths: Sequence[str]) -> Adapter | None:
    """Only these modules of an adapter."""
    modules = {path: adapter.modules[path] for path in paths if path in adapter.modules}
    return replace(adapter, modules=modules) if modules else None


def _merge(modules: Mapping[str, LoRA]) -> Adapter | None:
    return Adapter("merge", dict(modules)) if modules else None


def _by_input(seen: _Seen) -> Iterator[list[str]]:
    """Modules in the order in which they run, those with the same input together."""
    together: dict[int, list[str]] = {}
    for path, x in seen.inputs.items():
        together.setdefault(id(x), []).append(path)
    yield from together.values()
