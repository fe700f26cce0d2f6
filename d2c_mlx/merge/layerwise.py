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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import Factors
from d2c_mlx.evaluate.capture import capture_modules
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.merge.block_passes import BlockPasses, Part, Seen, parts_of
from d2c_mlx.merge.regmean import Grams, matched
from d2c_mlx.models.base_model import BaseModel, block_index
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import blocks_are_exact
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.errors import ModelError

__all__ = ["LayerwiseOptions", "check_blocks", "merge_layerwise"]

# Modules whose dense update takes more bytes are fitted one after the other: a solver holds several
# times as much.
_LARGE = 1 << 25
# Outputs of a block's modules are kept, and so computed once, if they take at most so many bytes.
_KEPT = 1 << 28


@dataclass(frozen=True)
class LayerwiseOptions:
    """Options of a merge.

    Attributes:
        scale: factor of every update, which later blocks take into account.
        strength: share of the error that is compensated, between 0 and 1. All of it would overfit a
            few rows; none is closer by loss where rows are few, and further from what the members
            answer.
        rank: most columns of every module; None takes the largest of the members.
        most: tokens read of each set, evenly spaced; None reads all.
    """

    scale: float = 1.0
    strength: float = 0.75
    rank: int | None = None
    most: int | None = None


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
    options: LayerwiseOptions | None = None,
    workers: Workers | None = None,
) -> Adapter:
    """Merge adapters layer by layer; the top of this file has the equation.

    Use it on models that pass `check_blocks`; RegMean++ in merger.py works on any model.

    Args:
        base: the base model; no adapter stays attached.
        adapters: at least two, sorted by name.
        sets: examples of each adapter's task, in the same order. Tokens that all rows of all
            members begin with are never read.
        options: how to fit; None takes the defaults.
        workers: threads that run the model; None uses this thread.

    Returns:
        Float32 factors with scale 1 (that of the options is folded in), named after the members.
    """
    options = options or LayerwiseOptions()
    rank = options.rank or max(adapter.rank for adapter in adapters)
    for adapter in adapters:  # Capturing wraps modules that can hold an adapter.
        base.attach(adapter)
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    with capture_modules(base.model, paths) as here:
        parts = parts_of(base, sets, options.most)
        widths: dict[int, int] = {}  # of all outputs of a block's modules
        for path in paths:
            block = block_index(path)
            widths[block] = widths.get(block, 0) + base.module_shapes[path][1]
        keep = 4 * max(widths.values()) * sum(part.n_tokens for part in parts) <= _KEPT
        passes = BlockPasses(base, workers or Workers(1), here, keep)
        merging = _Merging(passes, adapters, options, rank, parts)
        merging.run()
    base.attach(None)
    names = tuple(adapter.name for adapter in adapters)
    modules = dict(sorted(merging.modules.items()))
    return Adapter("+".join(names), modules, adapters[0].base, names)


@dataclass
class _Merging:
    """A merge on its way through the blocks.

    Attributes:
        parts: the rows, at first before block 0.
        modules: the modules fitted so far.
    """

    passes: BlockPasses
    adapters: Sequence[Adapter]
    options: LayerwiseOptions
    rank: int
    parts: Sequence[Part]
    modules: dict[str, LoRA] = field(default_factory=dict)

    def run(self) -> None:
        """Fit all modules, from the first block to the last."""
        blocks: dict[int, list[str]] = {}
        for path in sorted({path for adapter in self.adapters for path in adapter.modules}):
            blocks.setdefault(block_index(path), []).append(path)
        # Below the first block that a member changes, all members equal the base model.
        self.parts = own = self.passes.through(self.parts, range(min(blocks)))
        for block in range(min(blocks), max(blocks) + 1):
            paths = blocks.get(block, [])
            taught, groups = self.teach(own, block, paths)
            for group in groups:
                fitted = _only(Adapter("merge", self.modules), paths)
                seen = self.passes.see(self.parts, block, fitted, group, group[-1])
                updates = self.fit(group, seen, taught)
                self.parts = self.passes.adapted(self.parts, seen, updates)
                self.modules |= updates
                for part in taught:
                    for path in group:
                        del part.outputs[path]
            merge = _only(Adapter("merge", self.modules), paths)
            self.parts = self.passes.through(self.parts, [block], merge)
            own = [part.after for part in taught]

    def teach(
        self, own: Sequence[Part], block: int, paths: Sequence[str]
    ) -> tuple[list[Seen], list[list[str]]]:
        """Run a block under the members; groups of its modules with the same input, as they run."""
        taught: list[Seen] = []
        together: dict[int, list[str]] = {}
        for i, adapter in enumerate(self.adapters):
            parts = [part for part in own if part.task == i]
            seen = self.passes.see(parts, block, _only(adapter, paths), paths)
            if i == 0:
                for path, x in seen[0].inputs.items():
                    together.setdefault(id(x), []).append(path)
            taught += [replace(part, inputs={}) for part in seen]
        return taught, list(together.values())

    def fit(
        self, paths: Sequence[str], seen: Sequence[Seen], taught: Sequence[Seen]
    ) -> dict[str, LoRA]:
        """Fit the modules `paths`, which have the same input.

        Args:
            paths: paths of the modules.
            seen: for every part, the block without these modules.
            taught: for every part, the block under its own member, which gives the targets.
        """
        o, shapes = self.options, self.passes.base.module_shapes

        def by_task(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
            """Join the arrays of the parts of each task."""
            joined: dict[int, list[np.ndarray]] = {}
            for part, x in zip(self.parts, arrays):
                joined.setdefault(part.task, []).append(x)
            return [np.concatenate(joined[task]) for task in sorted(joined)]

        def factors(adapter: Adapter, path: str) -> Factors:
            """Without columns where the adapter lacks the module."""
            if path in adapter.modules:
                return adapter.modules[path].factors()
            width, out = shapes[path]
            return np.zeros((width, 0), np.float32), np.zeros((0, out), np.float32)

        def solve(path: str, members: Sequence[Factors]) -> Factors:
            targets = by_task(part.outputs[path] for part in taught)
            bare = by_task(part.outputs[path] for part in seen)
            lacking = [
                o.strength * (target - (output + (x @ a) @ b))
                for target, output, x, (a, b) in zip(targets, bare, inputs, members)
            ]
            return matched(members, grams, lacking, self.rank)

        inputs = by_task(part.inputs[paths[0]] for part in seen)
        large = any(4 * math.prod(shapes[path]) > _LARGE for path in paths)
        if large:  # The solver needs room, of which MLX keeps some for its next pass.
            give_back_memory()
        # Threads as in `merge_adapters`. They use no MLX: for each that does it starts a thread of
        # its own, which stays.
        updates = [[factors(adapter, path) for adapter in self.adapters] for path in paths]
        with threadpool_limits(1), ThreadPoolExecutor(1 if large else len(paths)) as pool:
            grams = Grams(inputs)
            solved = zip(paths, pool.map(solve, paths, updates))
            return {path: LoRA(mx.array(a), mx.array(o.scale * b)) for path, (a, b) in solved}


def _only(adapter: Adapter, paths: Sequence[str]) -> Adapter | None:
    """The adapter with these modules alone; None if it has none of them."""
    modules = {path: adapter.modules[path] for path in paths if path in adapter.modules}
    return replace(adapter, modules=modules) if modules else None
