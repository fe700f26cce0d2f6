"""Running the blocks of a model one at a time over rows, with what their modules see and say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.batches import shared_prefix
from d2c_mlx.evaluate.capture import Capture, StopForward, TokenBatch, token_batches
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import KeysValues, prefix_is_exact, run_blocks, run_prefix

__all__ = ["BlockPasses", "Part", "Seen", "parts_of"]

# Padded tokens of a part. Members run one at a time, so parts are small enough for all workers.
_BATCH = 256
# Least tokens of a prefix that is run apart from the rows.
_PREFIX = 4


@dataclass(frozen=True)
class Part:
    """Some rows of a task on their way through the blocks.

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
class Seen:
    """The output of a block for a part, and what reached some of its modules.

    Attributes:
        after: the part after the block; before it where the block was stopped.
        inputs: inputs of the modules at the kept tokens, float32 `(n_kept, in)`. Modules with the
            same input share one array.
        outputs: outputs, float32 `(n_kept, out)`.
        whole: input and output of every token, only where `keep` is set and the block was
            stopped.
    """

    after: Part
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    whole: dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class BlockPasses:
    """Runs blocks of a base model, whose modules are captured.

    Attributes:
        base: the base model; its blocks must run alone, see `blocks_are_exact`.
        workers: threads that run it.
        here: captures of the modules.
        keep: keep the outputs of adapted modules, see `adapted`, for the passes that follow.
    """

    base: BaseModel
    workers: Workers
    here: Capture
    keep: bool

    def see(
        self,
        parts: Sequence[Part],
        block: int,
        adapter: Adapter | None,
        paths: Sequence[str],
        last: str | None = None,
    ) -> list[Seen]:
        """Run a block on every part, and keep inputs and outputs of its modules `paths`.

        With `last` the block stops after that module. Parts are at the same block, and their
        prefixes are one.
        """
        self.base.attach(adapter)
        prefix, states = self._prefix(parts, block, last)

        def run(part: Part) -> Seen:
            inputs: dict[str, mx.array] = {}
            outputs: dict[str, mx.array] = {}
            here, after = self.here, part
            here.inputs, here.outputs, here.given = inputs, outputs, part.outputs
            here.stop_after = last
            with suppress(StopForward):
                hidden = run_blocks(self.base.model, part.hidden, states, block, block + 1)
                mx.eval(hidden)
                after = Part(part.task, part.batch, hidden, prefix)
            kept_inputs, kept_outputs = (
                part.batch.kept_by_module({path: x for path, x in of.items() if path in paths})
                for of in (inputs, outputs)
            )
            keep = kept_inputs if last and self.keep else ()
            whole = {path: (inputs[path], outputs[path]) for path in keep}
            return Seen(after, kept_inputs, kept_outputs, whole)

        seen = dict(self.workers.run(lambda batch: [run(part) for part in batch], parts))
        return [seen[i] for i in range(len(parts))]

    def through(
        self, parts: Sequence[Part], blocks: Sequence[int], adapter: Adapter | None = None
    ) -> list[Part]:
        """The parts after some blocks."""
        for block in blocks:
            parts = [seen.after for seen in self.see(parts, block, adapter, ())]
        return list(parts)

    def _prefix(
        self, parts: Sequence[Part], block: int, last: str | None
    ) -> tuple[mx.array | None, list[KeysValues] | None]:
        """The prefix after a block, and its keys and values there."""
        before = parts[0].prefix
        if before is None:
            return None, None
        here = self.here
        here.inputs, here.outputs, here.given, here.stop_after = {}, None, {}, None
        after, states = run_prefix(self.base.model, before, block, block + 1)
        # Here, because threads with streams of their own will read them.
        mx.eval(states, after if last is None else ())
        return after, states

    def adapted(
        self, parts: Sequence[Part], seen: Sequence[Seen], modules: Mapping[str, LoRA]
    ) -> list[Part]:
        """The parts before the same block, whose `modules` are now adapted.

        Args:
            parts: the parts.
            seen: what was seen of them up to these modules, without their updates.
            modules: the updates.
        """
        if not self.keep:
            return list(parts)
        dtype, adapted = self.base.compute_dtype, []
        for part, of_part in zip(parts, seen):
            outputs = dict(part.outputs)
            for path, lora in modules.items():
                x, y = of_part.whole[path]
                outputs[path] = y + (x @ lora.a.astype(dtype)) @ lora.b.astype(dtype)
            adapted.append(replace(part, outputs=outputs))
        mx.eval([part.outputs for part in adapted])
        return adapted


def parts_of(base: BaseModel, sets: Sequence[ExampleSet], most: int | None) -> list[Part]:
    """All rows in parts; the tokens that all rows begin with are not kept.

    Such a token is one input with a different target for every member.

    Args:
        base: the base model.
        sets: the rows of each task.
        most: tokens of each set that are kept, evenly spaced; None keeps all.
    """
    rows = tuple(row for examples in sets for row in examples.examples)
    shared = shared_prefix(ExampleSet("all", rows), least=1)
    n = len(shared) if len(shared) >= _PREFIX and prefix_is_exact(base.model) else 0
    prefix = mx.array([shared]) if n else None
    return [
        Part(i, batch.without_first(n), mx.array(batch.tokens[:, n:]), prefix)
        for i, examples in enumerate(sets)
        for batch in token_batches(examples, most, len(shared), _BATCH)
    ]
