"""What reaches the linear modules of a model: the activations that RegMean needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import by_length
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks
from d2c_mlx.utils.errors import ModelError

__all__ = ["Enough", "Inputs", "TokenBatch", "input_activations", "tapped", "token_batches"]

# Padded tokens that a worker evaluates at a time.
_BATCH = 512

# Module path -> `(n_tokens, in)`, float32. Modules with the same input (q, k and v of a block)
# share one array.
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TokenBatch:
    """Some rows of a set, and where in them and in the set's result its kept tokens are."""

    tokens: np.ndarray
    rows: list[int]
    columns: list[int]
    places: list[int]

    @property
    def n_tokens(self) -> int:
        """With padding."""
        return self.tokens.size

    def kept(self, x: mx.array) -> np.ndarray:
        """`(n_kept, width)` float32 of `(rows, length, width)`."""
        return np.array(self._kept(x))

    def kept_of(self, seen: Mapping[str, mx.array]) -> Inputs:
        """`kept` of every module; those with the same array share one again."""
        some = {id(x): self._kept(x) for x in seen.values()}
        mx.eval(some)  # together: a GPU is waited for once
        arrays = {key: np.array(x) for key, x in some.items()}
        return {path: arrays[id(x)] for path, x in seen.items()}

    def _kept(self, x: mx.array) -> mx.array:
        return x[mx.array(self.rows), mx.array(self.columns)].astype(mx.float32)


def input_activations(
    base: BaseModel,
    adapter: Adapter | None,
    sets: Sequence[ExampleSet],
    paths: Sequence[str],
    most: int | None = None,
    workers: Workers | None = None,
) -> list[Inputs]:
    """Inputs of modules for tokens of examples, with `adapter` attached.

    Args:
        base: the model; `adapter` stays attached to it.
        adapter: of the tasks, or None for the bare model.
        sets: prompts and targets both count.
        paths: keys of `base.module_shapes`.
        most: tokens of each set, evenly spaced; None is all.
        workers: what evaluates; None is this thread.

    Returns:
        For every set the inputs, tokens in their order.
    """
    batches = [(i, batch) for i, one in enumerate(sets) for batch in token_batches(one, most)]
    found: list[list[tuple[TokenBatch, Inputs]]] = [[] for _ in sets]
    base.attach(adapter)
    with tapped(base.model, paths) as here:

        def body(some: Sequence[TokenBatch]) -> list[Inputs]:
            return [_run(base, here, batch) for batch in some]

        for j, inputs in (workers or Workers(1)).run(body, [batch for _, batch in batches]):
            i, batch = batches[j]
            found[i].append((batch, inputs))
    return [_joined(parts, paths) for parts in found]


def token_batches(
    examples: ExampleSet, most: int | None, skip: int = 0, batch: int = _BATCH
) -> Iterator[TokenBatch]:
    """A set's rows, alike in length, and which tokens to keep: at most `most`, evenly spaced.

    None of the first `skip` of a row. A row or at most `batch` padded tokens together.
    """
    rows = [example.tokens for example in examples.examples]
    starts = np.cumsum([0, *(max(0, len(row) - skip) for row in rows)])
    step = max(1, -(-int(starts[-1]) // most)) if most else 1
    for some in by_length([len(row) for row in rows], batch):
        # Zeros on the right, which nothing before them sees.
        tokens = np.zeros((len(some), max(len(rows[i]) for i in some)), np.int32)
        kept = []
        for j, i in enumerate(some):
            tokens[j, : len(rows[i])] = rows[i]
            first, last = (-(-int(start) // step) for start in starts[i : i + 2])
            before = int(starts[i]) - skip
            kept += [(j, place * step - before, place) for place in range(first, last)]
        if kept:
            r, columns, places = map(list, zip(*kept))
            yield TokenBatch(tokens, r, columns, places)


class Enough(Exception):  # noqa: N818  no error
    """What a thread wanted to see has been seen."""


class Here(threading.local):
    """What modules were seen to do in this thread, by path.

    Attributes:
        seen: their inputs.
        said: their outputs; None if nobody asks for them.
        last: the module after which `Enough` is raised.
    """

    def __init__(self) -> None:
        self.seen: dict[str, mx.array] = {}
        self.said: dict[str, mx.array] | None = None
        self.last: str | None = None


class _Tap(nn.Module):
    """A module that tells its thread what it does."""

    def __init__(self, path: str, module: nn.Module, here: Here) -> None:
        super().__init__()
        self.module = module
        self._path, self._here = path, here

    def __call__(self, x: mx.array) -> mx.array:
        self._here.seen[self._path] = x
        y = self.module(x)
        if self._here.said is not None:
            self._here.said[self._path] = y
        if self._here.last == self._path:
            raise Enough
        return y


@contextmanager
def tapped(model: nn.Module, paths: Sequence[str]) -> Iterator[Here]:
    """Within it, these modules tell every thread what they do; see `Here`."""
    here = Here()
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in paths}
    taps = {path: _Tap(path, module, here) for path, module in own.items()}
    model.update_modules(tree_unflatten(list(taps.items())))
    try:
        yield here
    finally:
        model.update_modules(tree_unflatten(list(own.items())))


def _run(base: BaseModel, here: Here, batch: TokenBatch) -> Inputs:
    here.seen = {}
    tokens = mx.array(batch.tokens)
    try:
        mx.eval(run_blocks(base.model, tokens))
    except ModelError:
        mx.eval(base.model(tokens))  # its head cannot be left out
    return batch.kept_of(here.seen)


def _joined(parts: Sequence[tuple[TokenBatch, Inputs]], paths: Sequence[str]) -> Inputs:
    """The tokens of all batches of a set in their order."""
    order = np.argsort([place for batch, _ in parts for place in batch.places])
    arrays: dict[tuple[int, ...], np.ndarray] = {}
    result = {}
    for path in paths:
        some = [inputs[path] for _, inputs in parts]
        same = tuple(map(id, some))
        if same not in arrays:
            arrays[same] = np.concatenate(some)[order]
        result[path] = arrays[same]
    return result
