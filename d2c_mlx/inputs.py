"""What reaches the linear modules of a model: the activations that RegMean needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from d2c_mlx.adapter import Adapter
from d2c_mlx.batches import by_length
from d2c_mlx.forward import run_blocks
from d2c_mlx.model import BaseModel
from d2c_mlx.tasks import ExampleSet

__all__ = ["input_activations"]

# Padded tokens that are evaluated at a time.
_BATCH = 1024


class _Tap(nn.Module):
    """A module that remembers its inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return self.module(x)


def input_activations(
    base: BaseModel, adapter: Adapter | None, examples: ExampleSet, paths: Iterable[str]
) -> dict[str, np.ndarray]:
    """Inputs of modules for every token of every example, with `adapter` attached.

    Args:
        base: the model; `adapter` stays attached to it.
        adapter: the task's own, or None for the bare model.
        examples: of the task; prompts and targets both count.
        paths: keys of `base.module_shapes`.

    Returns:
        Path -> `(n_tokens, in)`, float32, examples in their order. Modules with the same input
        (q, k and v of a block) share one array.
    """
    rows = [example.tokens for example in examples.examples]
    batches = list(by_length([len(row) for row in rows], _BATCH))
    base.attach(adapter)
    modules = dict(base.model.named_modules())
    taps = {path: _Tap(modules[path]) for path in paths}
    base.model.update_modules(tree_unflatten(list(taps.items())))
    try:
        for batch in batches:
            mx.eval(run_blocks(base.model, mx.array(_padded([rows[i] for i in batch]))))
    finally:
        own = [(path, tap.module) for path, tap in taps.items()]
        base.model.update_modules(tree_unflatten(own))
    arrays: dict[tuple[int, ...], np.ndarray] = {}
    result = {}
    for path, tap in taps.items():
        same = tuple(map(id, tap._seen))
        if same not in arrays:
            found: dict[int, np.ndarray] = {}
            for batch, x in zip(batches, tap._seen):
                tokens = np.array(x.astype(mx.float32))
                found |= {i: tokens[j, : len(rows[i])] for j, i in enumerate(batch)}
            arrays[same] = np.concatenate([found[i] for i in range(len(rows))])
        result[path] = arrays[same]
    return result


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """`(n_rows, width)`, zeros on the right, which nothing before them sees."""
    x = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(x, rows):
        row[: len(tokens)] = tokens
    return x
