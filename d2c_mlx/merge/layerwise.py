"""Layer-wise merging: every module is fitted to the outputs of the members' own modules.

RegMean fits a module to its members' updates on their inputs. But the blocks below are merged too,
so the inputs are no longer those of a member. Here a part of that error is compensated. With inputs
x under the merge and x_i under member i, a module's update dW is the least squares solution, over
all members, of

    x dW = x dW_i + strength * (x_i (W + dW_i) - x (W + dW_i))

At strength 0 it is RegMean++ (https://arxiv.org/abs/2508.03121), block by block as in its paper.
Otherwise it is layer-wise distillation (ProDistill, https://arxiv.org/abs/2502.12706) in closed
form, with the targets of asymmetric calibration (GPTAQ, https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import Factors
from d2c_mlx.evaluate.capture import capture_modules
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.merge.block_passes import BlockPasses, Part, Seen, parts_of
from d2c_mlx.merge.regmean import Grams, matched, regmean
from d2c_mlx.models.base_model import BaseModel, block_index
from d2c_mlx.models.exact import blocks_are_exact
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import ModelError

__all__ = ["STRENGTH", "check_blocks", "merge_layerwise"]

# Share of the error that is compensated. All of it would overfit a few rows.
STRENGTH = 0.75
# Modules whose dense update takes more bytes are fitted one after the other, on all cores, and one
# merge after the other: a solver holds several times as much, and so do their outputs.
_LARGE = 1 << 25
# Outputs of a block's modules are kept, and so computed once, if they take at most so many bytes.
_KNOWN = 1 << 28


@dataclass
class _Merge:
    """A merge on its way through the blocks, with the modules fitted so far."""

    scale: float
    strength: float
    parts: Sequence[Part]
    modules: dict[str, LoRA] = field(default_factory=dict)

    def some(self, paths: Sequence[str]) -> Adapter | None:
        return _some(Adapter("merge", self.modules), paths)


def check_blocks(base: BaseModel) -> None:
    """Check that a model can be run block by block; call it before `merge_layerwise`.

    Raises:
        ModelError: blocks that run one at a time do not give the model's own output.
    """
    if not blocks_are_exact(base.model):
        raise ModelError(
            f"{base.name}: merge_method layerwise runs the model block by block, which gives"
            " something else with this architecture; take regmean++"
        )


def merge_layerwise(
    base: BaseModel,
    adapters: Sequence[Adapter],
    sets: Sequence[ExampleSet],
    aims: Sequence[tuple[float, float]],
    rank: int | None = None,
    most: int | None = None,
    workers: Workers | None = None,
) -> list[Adapter]:
    """Merge adapters layer by layer, once for every aim; the top of this file has the equation.

    Use it on models that pass `check_blocks`; RegMean++ in merger.py works on any model. The
    members run once for all aims.

    Args:
        base: the base model; no adapter stays attached.
        adapters: at least two, sorted by name.
        sets: examples of each adapter's task, in the same order.
        aims: pairs of a scale of every update, which later blocks take into account, and a strength
            of the error compensation, between 0 and 1.
        rank: most columns of every module of the result; None takes the largest of `adapters`.
        most: tokens read of each set, evenly spaced; None reads all. Tokens that all rows of all
            members begin with are never read.
        workers: threads that run the model; None uses this thread.

    Returns:
        One adapter per aim, of float32 factors with scale 1 (the aim's is folded in), named after
        the members.
    """
    rank = rank or max(adapter.rank for adapter in adapters)
    for adapter in adapters:  # Capturing wraps modules that can hold an adapter.
        base.attach(adapter)
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    with capture_modules(base.model, paths) as here:
        parts = parts_of(base, sets, most)
        keep = _has_room(base, paths, parts, len(aims))
        passes = BlockPasses(base, workers or Workers(1), here, keep)
        merges = _Merging(base, adapters, rank, passes).merges(parts, aims)
    base.attach(None)
    names = tuple(adapter.name for adapter in adapters)
    return [
        Adapter("+".join(names), dict(sorted(one.modules.items())), adapters[0].base, names)
        for one in merges
    ]


@dataclass(frozen=True)
class _Merging:
    """The arguments of `merge_layerwise` that all blocks share."""

    base: BaseModel
    adapters: Sequence[Adapter]
    rank: int
    passes: BlockPasses

    def merges(self, parts: Sequence[Part], aims: Sequence[tuple[float, float]]) -> list[_Merge]:
        """Fit the modules of every merge, from the first block to the last."""
        blocks = _paths_of_blocks(self.adapters)
        # Below the first block that a member changes, all members equal the base model.
        own = self.passes.through(parts, range(min(blocks)))
        merges = [_Merge(scale, strength, own) for scale, strength in aims]
        for block in range(min(blocks), max(blocks) + 1):
            paths = blocks.get(block, [])
            taught, groups = self.teach(own, block, paths)
            for group in groups:
                for some in self._at_once(merges, group):
                    seen = [
                        self.passes.see(one.parts, block, one.some(paths), group, group[-1])
                        for one in some
                    ]
                    self.fit(some, group, seen, taught)
                    for one, rows in zip(some, seen):
                        fitted = {path: one.modules[path] for path in group}
                        one.parts = self.passes.adapted(one.parts, rows, fitted)
                for part in taught:
                    for path in group:
                        del part.outputs[path]
            for one in merges:
                one.parts = self.passes.through(one.parts, [block], one.some(paths))
            own = [one.after for one in taught]
        return merges

    def teach(
        self, own: Sequence[Part], block: int, paths: Sequence[str]
    ) -> tuple[list[Seen], list[list[str]]]:
        """Run a block under the members; groups of its modules with the same input, as they run."""
        taught: list[Seen] = []
        groups: list[list[str]] = []
        for i, adapter in enumerate(self.adapters):
            some = [part for part in own if part.task == i]
            seen = self.passes.see(some, block, _some(adapter, paths), paths)
            groups = groups or list(_by_input(seen[0]))
            taught += [replace(one, inputs={}) for one in seen]
        return taught, groups

    def _at_once(self, merges: list[_Merge], paths: Sequence[str]) -> list[list[_Merge]]:
        """Merges whose modules `paths` are fitted at once: all, or one where these are large."""
        large = any(4 * math.prod(self.base.module_shapes[path]) > _LARGE for path in paths)
        return [[one] for one in merges] if large else [merges]

    def fit(
        self,
        merges: Sequence[_Merge],
        paths: Sequence[str],
        seen: Sequence[Sequence[Seen]],
        taught: Sequence[Seen],
    ) -> None:
        """Fit the modules `paths`, which have the same input, of every merge.

        Args:
            merges: merges with the same parts.
            paths: paths of the modules.
            seen: for every merge and part, the block without these modules.
            taught: for every part, the block under its own member, which gives the targets.
        """
        by_task = partial(_by_task, [part.task for part in merges[0].parts])
        factors = {path: [self._factors(one, path) for one in self.adapters] for path in paths}
        tokens = [by_task(one.inputs[paths[0]] for one in some) for some in seen]

        def solve(i: int, path: str) -> Factors:
            if merges[i].strength == 0:  # five times as fast, and the same
                return regmean(factors[path], grams[i], self.rank)
            wanted = by_task(one.outputs[path] for one in taught)
            bare = by_task(one.outputs[path] for one in seen[i])
            lacking = [
                merges[i].strength * (y - (said + (x @ a) @ b))
                for y, said, x, (a, b) in zip(wanted, bare, tokens[i], factors[path])
            ]
            return matched(factors[path], grams[i], lacking, self.rank)

        each = [(i, path) for i in range(len(merges)) for path in paths]
        # A merge comes alone where its modules are large, see `_at_once`: then each has all cores.
        threads, blas = (len(each), 1) if len(merges) > 1 else (1, None)
        # Threads as in `merge_adapters`. They use no MLX, whose streams belong to a thread.
        with threadpool_limits(blas), ThreadPoolExecutor(threads) as pool:
            grams = list(pool.map(Grams, tokens))
            found = list(pool.map(solve, *zip(*each)))
        for (i, path), (a, b) in zip(each, found):
            merges[i].modules[path] = LoRA(mx.array(a), mx.array(merges[i].scale * b))

    def _factors(self, adapter: Adapter, path: str) -> Factors:
        """An adapter's factors of a module; without columns where the adapter lacks it."""
        if path in adapter.modules:
            return adapter.modules[path].factors()
        width, out = self.base.module_shapes[path]
        return np.zeros((width, 0), np.float32), np.zeros((0, out), np.float32)


def _has_room(base: BaseModel, paths: Sequence[str], parts: Sequence[Part], n_merges: int) -> bool:
    """True if there is room for all outputs of a block's modules in every merge."""
    widths: dict[int, int] = {}
    for path in paths:
        block = block_index(path)
        widths[block] = widths.get(block, 0) + base.module_shapes[path][1]
    n_tokens = sum(part.n_tokens for part in parts)
    return 4 * max(widths.values()) * n_tokens * n_merges <= _KNOWN


def _by_task(places: Sequence[int], arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Join the arrays of each task, given the task of every array."""
    found: dict[int, list[np.ndarray]] = {}
    for task, x in zip(places, arrays):
        found.setdefault(task, []).append(x)
    return [np.concatenate(found[task]) for task in sorted(found)]


def _paths_of_blocks(adapters: Sequence[Adapter]) -> dict[int, list[str]]:
    blocks: dict[int, list[str]] = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        blocks.setdefault(block_index(path), []).append(path)
    return blocks


def _some(adapter: Adapter, paths: Sequence[str]) -> Adapter | None:
    """The adapter with these modules alone; None if it has none of them."""
    modules = {path: adapter.modules[path] for path in paths if path in adapter.modules}
    return replace(adapter, modules=modules) if modules else None


def _by_input(seen: Seen) -> Iterator[list[str]]:
    """Yield groups of modules with the same input, in the order in which they run."""
    together: dict[int, list[str]] = {}
    for path, x in seen.inputs.items():
        together.setdefault(id(x), []).append(path)
    yield from together.values()
