"""Layer-wise merging: every module is fitted to the outputs of the members' own modules.

RegMean fits a module to its members' updates on their inputs. But the blocks below are merged too,
so the inputs are no longer those of a member. Here a part of that error is compensated. With inputs
x under the merge and x_i under member i, a module's update dW is the least squares solution, over
all members, of

    x dW = x dW_i + strength * (x_i (W + dW_i) - x (W + dW_i))

At strength 0 it is RegMean++ (https://arxiv.org/abs/2508.03121), block by block as in its paper.
Otherwise it is layer-wise distillation (ProDistill, https://arxiv.org/abs/2502.12706) in closed
form, with the targets of asymmetric calibration (GPTAQ, https://arxiv.org/abs/2504.02692). With
sketches of the loss's derivatives the rank is spent on the outputs that the loss depends on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import Factors
from d2c_mlx.evaluate.batches import shared_prefix
from d2c_mlx.evaluate.capture import (
    Capture,
    StopForward,
    TokenBatch,
    capture_modules,
    token_batches,
)
from d2c_mlx.evaluate.distill import OutputSketch
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.merge.combine import Grams, OutputMetric, regmean
from d2c_mlx.merge.methods import factors_of
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks, run_prefix
from d2c_mlx.models.model import Model, block_index
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.errors import ModelError

# Padded tokens of a part. Members run one at a time, so parts are small enough for all workers.
_BATCH = 256
# Least tokens of a prefix that is run apart from the rows.
_PREFIX = 4
# Modules whose dense update takes more bytes are fitted one after the other: a solver holds several
# times as much.
_LARGE = 1 << 25
# Outputs of a block's modules are kept, and so computed once, if they take at most so many bytes.
_KEPT = 1 << 28


@dataclass(frozen=True)
class Part:
    """Rows of a task on their way through the blocks.

    Attributes:
        task: index of the task.
        batch: the rows, and which of their tokens are kept.
        hidden: hidden states before the next block, `(rows, length, hidden)`; token ids before the
            first one.
        prefix: the same of the tokens that all rows begin with, `(1, n, hidden)`; None if they are
            in `hidden`.
        outputs: outputs of modules of the next block, by path, which no pass computes again.
    """

    task: int
    batch: TokenBatch
    hidden: mx.array
    prefix: mx.array | None = None
    outputs: Mapping[str, mx.array] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.batch.n_tokens


@dataclass(frozen=True)
class _Seen:
    """The output of a block for a part, and what reached some of its modules.

    Attributes:
        after: the part after the block; before it where the block was stopped.
        inputs: inputs of the modules at the kept tokens, float32 `(n_kept, in)`. Modules with the
            same input share one array.
        outputs: outputs, float32 `(n_kept, out)`.
        whole: input and output of every token, only where outputs are kept.
    """

    after: Part
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    whole: dict[str, tuple[mx.array, mx.array]]


def check_blocks(base: Model) -> None:
    """Check that a model can be run block by block; call it before `merge_layerwise`.

    Raises:
        ModelError: blocks that run one at a time do not give the model's own output.
    """
    if not base.runs_in_parts(range(1, base.n_layers), prefix=False):
        raise ModelError(
            f"{base.name}: merge_method layerwise runs the model block by block, which gives"
            " something else with this architecture; take regmean++"
        )


def merge_layerwise(
    base: Model,
    adapters: Sequence[Adapter],
    sets: Sequence[ExampleSet],
    workers: Workers | None = None,
    *,
    scale: float = 1.0,
    strength: float = 0.75,
    rank: int | None = None,
    most: int | None = None,
    sketches: Sequence[OutputSketch] = (),
    advance: Callable[[float], object] = float,
) -> Adapter:
    """Merge adapters layer by layer; the top of this file has the equation.

    Use it on models that pass `check_blocks`; RegMean++ in merging.py works on any model.

    Args:
        base: the base model; no adapter stays attached.
        adapters: at least two, sorted by name.
        sets: examples of each adapter's task, in the same order. Tokens that all rows of all
            members begin with are never read.
        workers: threads that run the model; None uses this thread.
        scale: factor of every update, which later blocks take into account.
        strength: share of the error that is compensated, between 0 and 1. All of it would overfit a
            few rows; none is closer by loss where rows are few, and further from what the members
            answer.
        rank: most columns of every module; None takes the largest of the members.
        most: tokens read of each set, evenly spaced; None reads all.
        sketches: the `output_sketch` of each adapter; empty weighs all outputs alike.
        advance: called after every block with its share of the work.

    Returns:
        Float32 factors with scale 1 (`scale` is folded in), named after the members.
    """
    rank = rank or max(adapter.rank for adapter in adapters)
    blocks: dict[int, list[str]] = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        blocks.setdefault(block_index(path), []).append(path)
    for adapter in adapters:  # Capturing wraps modules that can hold an adapter.
        base.attach(adapter)
    modules, blas = dict[str, LoRA](), ThreadpoolController()
    with capture_modules(base.model, sum(blocks.values(), [])) as capture:
        parts = parts_of(base, sets, most)
        width = max(sum(base.module_shapes[path][1] for path in paths) for paths in blocks.values())
        keep = 4 * width * sum(part.n_tokens for part in parts) <= _KEPT
        run = _Run(base, workers or Workers(1), capture, keep)
        # Below the first block that a member changes, all members equal the base model.
        for block in range(min(blocks)):
            parts = [seen.after for seen in run.block(parts, block, {})]
        own = parts
        for block in range(min(blocks), max(blocks) + 1):
            paths = blocks.get(block, [])
            # The block under every member, which gives the targets.
            taught: list[_Seen] = []
            for i, adapter in enumerate(adapters):
                of_task = [part for part in own if part.task == i]
                taught += run.block(of_task, block, adapter.modules, paths)
            together: dict[int, list[str]] = {}  # modules with the same input, as they run
            for path, x in taught[0].inputs.items():
                together.setdefault(id(x), []).append(path)
            own, targets = [seen.after for seen in taught], [seen.outputs for seen in taught]
            del taught
            for group in together.values():
                bare = run.block(parts, block, modules, group, group[-1])
                with blas.limit(limits=1):  # as in `merge_adapters`
                    updates = _fit(base, adapters, group, bare, targets, strength, rank, sketches)
                for path, (a, b) in updates.items():
                    modules[path] = LoRA(mx.array(a), mx.array(scale * b))
                if keep:
                    parts = [_adapted(base, seen, group, modules) for seen in bare]
                    mx.eval([part.outputs for part in parts])
                for outputs in targets:
                    for path in group:
                        del outputs[path]
            parts = [seen.after for seen in run.block(parts, block, modules)]
            advance(1 / (max(blocks) + 1 - min(blocks)))
    base.attach(None)
    names = tuple(adapter.name for adapter in adapters)
    return Adapter("+".join(names), dict(sorted(modules.items())), adapters[0].base, names)


def parts_of(base: Model, sets: Sequence[ExampleSet], most: int | None) -> list[Part]:
    """All rows in parts; of each set `most` tokens are kept, evenly spaced, None keeps all.

    Those that all rows begin with are not kept: one input with a target for every member.
    """
    rows = tuple(row for examples in sets for row in examples.examples)
    shared = shared_prefix(ExampleSet("all", rows), least=1)
    n = len(shared) if len(shared) >= _PREFIX and base.runs_in_parts() else 0
    prefix = mx.array([shared]) if n else None
    return [
        Part(i, batch, mx.array(batch.tokens), prefix)
        for i, examples in enumerate(sets)
        for batch in token_batches(examples, most, len(shared), n, _BATCH)
    ]


@dataclass(frozen=True)
class _Run:
    """Runs single blocks of a model whose modules are captured."""

    base: Model
    workers: Workers
    capture: Capture
    keep: bool

    def block(
        self,
        parts: Sequence[Part],
        block: int,
        modules: Mapping[str, LoRA],
        paths: Sequence[str] = (),
        last: str | None = None,
    ) -> list[_Seen]:
        """Run a block on every part under some updates, and keep inputs and outputs of `paths`.

        With `last` the block stops after that module.
        """
        here = {path: modules[path] for path in modules if block_index(path) == block}
        self.base.attach(Adapter("block", here) if here else None)
        capture, prefix, states = self.capture, parts[0].prefix, None
        if prefix is not None:
            capture.inputs, capture.outputs, capture.given, capture.stop_after = {}, None, {}, None
            prefix, states = run_prefix(self.base.model, prefix, block, block + 1)
            # Here, because threads with streams of their own will read them.
            mx.eval(states, prefix if last is None else ())

        def run(part: Part) -> _Seen:
            inputs: dict[str, mx.array] = {}
            outputs: dict[str, mx.array] = {}
            after = part
            capture.inputs, capture.outputs, capture.given = inputs, outputs, part.outputs
            capture.stop_after = last
            with suppress(StopForward):
                hidden = run_blocks(self.base.model, part.hidden, states, block, block + 1)
                mx.eval(hidden)
                after = Part(part.task, part.batch, hidden, prefix)
            kept_inputs, kept_outputs = (
                part.batch.kept_by_module({path: x for path, x in of.items() if path in paths})
                for of in (inputs, outputs)
            )
            whole = {path: (inputs[path], outputs[path]) for path in kept_inputs if self.keep}
            return _Seen(after, kept_inputs, kept_outputs, whole)

        seen = dict(self.workers.run(lambda batch: [run(part) for part in batch], parts))
        return [seen[i] for i in range(len(parts))]


def _adapted(base: Model, bare: _Seen, paths: Sequence[str], updates: Mapping[str, LoRA]) -> Part:
    """The part before the same block, which keeps the outputs of `paths` with their updates."""
    dtype, outputs = base.compute_dtype, dict(bare.after.outputs)
    for path in paths:
        (x, y), lora = bare.whole[path], updates[path]
        outputs[path] = y + (x @ lora.a.astype(dtype)) @ lora.b.astype(dtype)
    return replace(bare.after, outputs=outputs)


def _fit(
    base: Model,
    adapters: Sequence[Adapter],
    paths: Sequence[str],
    bare: Sequence[_Seen],
    targets: Sequence[Mapping[str, np.ndarray]],
    strength: float,
    rank: int,
    sketches: Sequence[OutputSketch],
) -> dict[str, Factors]:
    """Fit the modules `paths`, which have the same input.

    For every part, `bare` is the block without these modules, and `targets` has their outputs under
    its own member.
    """

    def by_task(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Join the arrays of the parts of each task, which are in the order of the tasks."""
        joined: list[list[np.ndarray]] = [[] for _ in adapters]
        for seen, x in zip(bare, arrays):
            joined[seen.after.task].append(x)
        return [np.concatenate(arrays) for arrays in joined]

    def solve(path: str, members: Sequence[Factors]) -> Factors:
        wish = by_task([outputs[path] for outputs in targets])
        without = by_task([seen.outputs[path] for seen in bare])
        lacking = [
            strength * (target - (output + (x @ a) @ b))
            for target, output, x, (a, b) in zip(wish, without, inputs, members)
        ]
        gradients = [sketch[path] for sketch in sketches if path in sketch]
        return regmean(
            members, grams, rank, lacking, OutputMetric(gradients) if gradients else None
        )

    inputs = by_task([seen.inputs[paths[0]] for seen in bare])
    large = any(4 * math.prod(base.module_shapes[path]) > _LARGE for path in paths)
    if large:  # The solver needs room, of which MLX keeps some for its next pass.
        give_back_memory()
    # Threads as in `merge_adapters`. They use no MLX: for each that does it starts a thread of its
    # own, which stays.
    members = [factors_of(adapters, path, base.module_shapes[path]) for path in paths]
    with ThreadPoolExecutor(1 if large else len(paths)) as pool:
        grams = Grams(inputs)
        return dict(zip(paths, pool.map(solve, paths, members)))
