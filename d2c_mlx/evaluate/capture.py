"""Capturing what reaches the linear modules of a model: the activations that RegMean needs."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import batches_by_length
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import ModelError

# Padded tokens that a worker evaluates at a time.
_BATCH = 512

# Module path -> `(n_tokens, in)`, float32. Modules with the same input (q, k and v of a block)
# share one array.
ModuleInputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of a set, and which of their tokens are kept.

    Attributes:
        tokens: int32 `(rows, length)`, padded on the right.
        rows: the row of every kept token.
        columns: the column of every kept token.
        places: where each kept token goes in the set's result.
    """

    tokens: np.ndarray
    rows: list[int]
    columns: list[int]
    places: list[int]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.tokens.size

    def kept_by_module(self, inputs: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
        """The kept tokens of every module's `(rows, length, width)`, float32 `(n_kept, width)`.

        Modules with the same array share one again.
        """
        places = mx.array(self.rows), mx.array(self.columns)
        distinct = {id(x): x[places].astype(mx.float32) for x in inputs.values()}
        mx.eval(distinct)  # together: a GPU is waited for once
        arrays = {key: np.array(x) for key, x in distinct.items()}
        return {path: arrays[id(x)] for path, x in inputs.items()}


def input_activations(
    base: Model,
    adapter: Adapter | None,
    sets: Sequence[ExampleSet],
    paths: Sequence[str],
    most: int | None = None,
    workers: Workers | None = None,
) -> list[ModuleInputs]:
    """Inputs of modules for the tokens of examples, with `adapter` attached.

    Args:
        base: the base model.
        adapter: None for the bare base model.
        sets: the examples; prompts and targets both count.
        paths: modules, keys of `base.module_shapes`.
        most: tokens of each set, evenly spaced; None takes all.
        workers: threads that evaluate; None takes this thread.

    Returns:
        For every set the inputs, tokens in their order.
    """
    batches = [(i, batch) for i, rows in enumerate(sets) for batch in token_batches(rows, most)]
    captured: list[list[tuple[TokenBatch, ModuleInputs]]] = [[] for _ in sets]
    with base.attached(adapter), capture_modules(base.model, paths) as capture:

        def inputs_of(batch: TokenBatch) -> ModuleInputs:
            capture.inputs = {}
            tokens = mx.array(batch.tokens)
            try:
                mx.eval(run_blocks(base.model, tokens))
            except ModelError:
                mx.eval(base.model(tokens))  # its head cannot be left out
            return batch.kept_by_module(capture.inputs)

        run = (workers or Workers(1)).run
        for j, inputs in run(lambda chunk: list(map(inputs_of, chunk)), [x for _, x in batches]):
            captured[batches[j][0]].append((batches[j][1], inputs))
    result: list[ModuleInputs] = []
    for parts in captured:
        order = np.argsort([place for batch, _ in parts for place in batch.places])
        # Modules that share arrays share one again.
        keys = {path: id(parts[0][1][path]) for path in paths}
        first = {key: path for path, key in keys.items()}
        joined = {key: np.concatenate([x[path] for _, x in parts]) for key, path in first.items()}
        in_order = {key: x[order] for key, x in joined.items()}
        result.append({path: in_order[key] for path, key in keys.items()})
    return result


def token_batches(
    examples: ExampleSet, most: int | None, skip: int = 0, apart: int = 0, batch: int = _BATCH
) -> Iterator[TokenBatch]:
    """Cut a set's rows into batches of similar length, and choose the tokens to keep.

    Args:
        examples: the set.
        most: tokens to keep, evenly spaced; None keeps all.
        skip: tokens at the start of every row that are never kept.
        apart: tokens at the start of every row that are not in its batch, `skip` at most.
        batch: most padded tokens of a batch; a longer row makes a batch alone.
    """
    rows = [example.tokens for example in examples.examples]
    starts = np.cumsum([0, *(max(0, len(row) - skip) for row in rows)]).tolist()
    step = max(1, -(-starts[-1] // most)) if most else 1
    for members in batches_by_length([len(row) for row in rows], batch):
        # Zeros on the right, which nothing before them sees.
        tokens = np.zeros((len(members), max(len(rows[i]) for i in members) - apart), np.int32)
        kept = []
        for j, i in enumerate(members):
            tokens[j, : len(rows[i]) - apart] = rows[i][apart:]
            first, last = (-(-start // step) for start in starts[i : i + 2])
            before = starts[i] - skip + apart
            kept += [(j, place * step - before, place) for place in range(first, last)]
        if kept:
            yield TokenBatch(tokens, *map(list, zip(*kept)))


class StopForward(Exception):  # noqa: N818  no error
    """Ends a forward pass in which everything wanted has been captured."""


class Capture(threading.local):
    """Activations that `capture_modules` captured in this thread, by module path.

    Attributes:
        inputs: inputs of the modules; set it to an empty dict before a pass.
        outputs: outputs of the modules; None, the default, captures none.
        stop_after: path of the module after which `StopForward` is raised; None runs to the end.
        given: outputs of modules, which are not run; nor is what only they need.
        shifts: added to the outputs of modules; a derivative by them is one by the outputs.
    """

    def __init__(self) -> None:
        self.given: Mapping[str, mx.array] = {}
        self.inputs: dict[str, mx.array] = {}
        self.outputs: dict[str, mx.array] | None = None
        self.stop_after: str | None = None
        self.shifts: Mapping[str, mx.array] = {}


class _CapturedModule(nn.Module):
    def __init__(self, path: str, module: nn.Module, capture: Capture) -> None:
        super().__init__()
        self.module = module
        self._path, self._capture = path, capture

    def __call__(self, x: mx.array) -> mx.array:
        if self._path in self._capture.given:
            return self._capture.given[self._path]
        self._capture.inputs[self._path] = x
        y = self.module(x)
        if self._path in self._capture.shifts:
            y = y + self._capture.shifts[self._path].astype(y.dtype)
        if self._capture.outputs is not None:
            self._capture.outputs[self._path] = y
        if self._capture.stop_after == self._path:
            raise StopForward
        return y


@contextmanager
def capture_modules(model: nn.Module, paths: Sequence[str]) -> Iterator[Capture]:
    """Capture inputs, and outputs if wanted, of modules in every pass inside the block.

    Each thread has captures of its own. `input_activations` does this for whole example sets.

    Args:
        model: any MLX model; its modules are as before after the block.
        paths: the modules.
    """
    capture = Capture()
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in paths}
    captured = {path: _CapturedModule(path, module, capture) for path, module in own.items()}
    model.update_modules(tree_unflatten(list(captured.items())))
    try:
        yield capture
    finally:
        model.update_modules(tree_unflatten(list(own.items())))
