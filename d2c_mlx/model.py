"""The base model: load it once, swap adapters in place, measure losses.

The only file that imports mlx_lm.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import dequantize_model, load

from d2c_mlx.adapter import Adapter
from d2c_mlx.blas import limit_blas_threads
from d2c_mlx.errors import ModelError, TaskError
from d2c_mlx.files import fingerprint, hash_file
from d2c_mlx.locate import resolve_model
from d2c_mlx.tasks import Example, ExampleSet, Row, row_format

__all__ = ["BaseModel"]

# Part of every fingerprint: raise it when a change of this file changes losses.
_ENGINE = 2


class _Slot(nn.Module):
    """A linear module with room for one LoRA: `linear(x) + (x @ a) @ b`."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.factors: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        if self.factors is None:
            return y
        a, b = self.factors
        return y + ((x @ a) @ b).astype(y.dtype)


class BaseModel:
    """A base model with swappable adapters.

    Attributes:
        name: as the user named it; `locate.EMBEDDED` for the default.
        path: its mlx-lm directory.
        dtype: the dtype of its activations as stored; packs are written in it.
    """

    def __init__(self, spec: str | None = None) -> None:
        """Load; on a CPU device weights become float32, which is fast and exact there."""
        self.name, self.path = resolve_model(spec)
        try:
            model, self.tokenizer = load(str(self.path), lazy=True)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{self.path}: mlx-lm cannot load it ({type(error).__name__}: {reason})"
            ) from None
        norm = model.model.norm.weight if hasattr(model.model, "norm") else None
        self.dtype: mx.Dtype = mx.float16 if norm is None else norm.dtype
        self.compute_dtype = self.dtype
        if mx.default_device().type == mx.DeviceType.cpu:
            self.compute_dtype = mx.float32
            model.set_dtype(mx.float32)
            model = dequantize_model(model)
        mx.eval(model.parameters())
        self.model = model
        self.module_shapes = _linear_shapes(model)
        self._slots: dict[str, _Slot] = {}
        self._streams = _evaluation_streams()
        self._head = self._prove_head()
        self._prefix_ok = self._prove_prefix()

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.model.layers)

    @property
    def n_streams(self) -> int:
        """How many example sets `nll` evaluates side by side."""
        return len(self._streams)

    @cached_property
    def config_hash(self) -> str:
        """Hex SHA-256 of the model's config.json."""
        return hash_file(self.path / "config.json")

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of engine, config, and every weight file's name, size and last MiB."""
        parts = [_ENGINE, self.config_hash, str(self.compute_dtype)]
        for file in sorted(self.path.glob("*.safetensors")) + sorted(self.path.glob("token*.json")):
            with open(file, "rb") as handle:
                size = file.stat().st_size
                handle.seek(max(0, size - (1 << 20)))
                parts.append([file.name, size, fingerprint(handle.read().hex())])
        return fingerprint(parts)

    def encode(self, task: str, rows: Sequence[Row]) -> ExampleSet:
        """Tokenize rows with mlx-lm's own dataset classes, prompts masked.

        Raises:
            TaskError: the tokenizer has no chat template, or a row has no target token.
        """
        masked = row_format(rows[0]) != ("text",)
        try:
            options = SimpleNamespace(mask_prompt=masked)
            dataset = create_dataset(list(rows), self.tokenizer, options)
            pairs = [dataset.process(row) for row in rows]
        except ValueError as error:
            raise TaskError(f"task {task}: mlx-lm cannot tokenize it ({error})") from None
        examples = tuple(Example(tuple(map(int, t)), int(offset)) for t, offset in pairs)
        empty = [i for i, example in enumerate(examples, 1) if example.n_targets < 1]
        if empty:
            raise TaskError(f"task {task}: row {empty[0]} has no target token")
        return ExampleSet(task, examples)

    def attach(self, adapter: Adapter | None) -> None:
        """Put an adapter in place of the last one; None leaves the bare base model."""
        modules = adapter.modules if adapter else {}
        new = [path for path in modules if path not in self._slots]
        if new:
            linears = dict(self.model.named_modules())
            slots = {path: _Slot(linears[path]) for path in new}
            self.model.update_modules(tree_unflatten(list(slots.items())))
            self._slots |= slots
        for path, slot in self._slots.items():
            if path not in modules:
                slot.factors = None
                continue
            lora = modules[path]
            b = lora.b.astype(mx.float32) * lora.scale
            slot.factors = lora.a.astype(self.compute_dtype), b.astype(self.compute_dtype)

    def nll(self, sets: Sequence[ExampleSet], max_tokens: int = 2048) -> list[float]:
        """Negative log likelihood of each set's target tokens under the attached adapter.

        A set's value depends on nothing but the set: the same bits whatever else is asked.

        Args:
            sets: the rows of one set may share a prefix, which is then run once.
            max_tokens: largest size of a padded batch, in tokens.

        Returns:
            One sum over target tokens per set, in nats.
        """
        sums = []
        for start in range(0, len(sets), len(self._streams)):
            pending = []
            for one, stream in zip(sets[start:], self._streams):
                with mx.stream(stream):
                    pending.append(self._set_nll(one.examples, max_tokens))
            mx.eval(pending)
            sums += [float(np.array(nll, np.float64).sum()) for nll in pending]
        return sums

    def _set_nll(self, examples: Sequence[Example], max_tokens: int) -> mx.array:
        """`(n_targets,)` NLL of every target token, not yet evaluated."""
        prefix = _shared_prefix(examples) if self._prefix_ok else ()
        states = self._run_prefix(prefix) if prefix else None
        batches = _batches([len(e.tokens) - len(prefix) for e in examples], max_tokens)
        parts = [
            self._batch_nll([examples[i] for i in batch], len(prefix), states) for batch in batches
        ]
        return mx.concatenate(parts)

    def _run_prefix(self, prefix: tuple[int, ...]) -> list[tuple[mx.array, mx.array]]:
        """Keys and values of every layer for one shared prefix, each `(1, heads, length, dim)`."""
        caches = make_prompt_cache(self.model)
        self._hidden(mx.array([prefix]), caches)
        return [(c.keys[..., : c.offset, :], c.values[..., : c.offset, :]) for c in caches]

    def _hidden(self, x: mx.array, cache: list[Any] | None = None) -> mx.array:
        return self.model.model(x, cache=cache)

    def _batch_nll(
        self,
        batch: Sequence[Example],
        n_prefix: int,
        states: list[tuple[mx.array, mx.array]] | None,
    ) -> mx.array:
        """`(n_targets,)` NLL of every target token of the batch, in order, not yet evaluated."""
        width = max(len(example.tokens) for example in batch) - 1 - n_prefix
        x = np.zeros((len(batch), width), np.int32)
        row, column, target = [], [], []
        for i, example in enumerate(batch):
            inputs = example.tokens[n_prefix:-1]
            x[i, : len(inputs)] = inputs
            positions = range(example.first_target, len(example.tokens))
            row += [i] * len(positions)
            column += [t - 1 - n_prefix for t in positions]
            target += [example.tokens[t] for t in positions]
        cache = None
        if states is not None:
            cache = [KVCache() for _ in states]
            for one, state in zip(cache, states):
                one.update_and_fetch(*(mx.repeat(x, len(batch), axis=0) for x in state))
        rows, columns = mx.array(row), mx.array(column)
        if self._head is not None:
            logits = self._head(self._hidden(mx.array(x), cache)[rows, columns])
        else:
            logits = self.model(mx.array(x), cache=cache)[rows, columns]
        logits = logits.astype(mx.float32)
        gold = mx.take_along_axis(logits, mx.array(target)[:, None], axis=-1)[:, 0]
        return _log_normaliser(logits) - gold

    def _prove_head(self) -> Any:  # noqa: ANN401  a callable module or None
        """The head as a function of hidden states, if it gives the model's own logits here.

        Some architectures scale or cap logits; then None, and full logits are computed instead.
        """
        inner = getattr(self.model, "model", None)
        head = getattr(self.model, "lm_head", None)
        if head is None:
            head = getattr(getattr(inner, "embed_tokens", None), "as_linear", None)
        x = mx.arange(1, 9)[None]
        try:
            same = head is not None and _close(head(self._hidden(x)), self.model(x))
        except (AttributeError, TypeError, ValueError):
            return None
        return head if same else None

    def _prove_prefix(self) -> bool:
        """Whether running a prefix once gives the same logits as running the whole row."""
        caches = make_prompt_cache(self.model)
        if not all(type(cache) is KVCache for cache in caches):
            return False
        x = mx.arange(1, 13)[None]
        whole = self.model(x)[:, 8:]
        self.model(x[:, :8], cache=caches)
        return _close(self.model(x[:, 8:], cache=caches), whole)


def _evaluation_streams() -> list[mx.Stream]:
    """One stream per core on a CPU device, where MLX runs elementwise work on a single core.

    With OpenBLAS held to one thread, two streams evaluate two tasks side by side: about 1.3 times
    the tokens per second on two cores (benchmarks/streams.py).
    """
    device = mx.default_device()
    if device.type != mx.DeviceType.cpu or not limit_blas_threads(1):
        return [mx.default_stream(device)]
    return [mx.new_stream(device) for _ in range(min(os.cpu_count() or 1, 8))]


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices sorted by length and cut into batches of at most `max_tokens` padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def _log_normaliser(logits: mx.array) -> mx.array:
    """`logsumexp` over the vocabulary in two steps of about sqrt(vocabulary) terms each.

    MLX's CPU kernel adds all terms one after the other in float32 and loses the small ones: a
    vocabulary of 49,152 came out up to 1e-4 nats too low.
    """
    n, width = logits.shape[0], 256
    padded = mx.pad(logits, [(0, 0), (0, -logits.shape[1] % width)], constant_values=-mx.inf)
    return mx.logsumexp(mx.logsumexp(padded.reshape(n, -1, width), axis=-1), axis=-1)


def _close(x: mx.array, y: mx.array) -> bool:
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    # A real difference (a cap, a scale, a wrong mask) is far above rounding in any dtype.
    return bool((mx.abs(x - y).max() <= 2e-2 * mx.maximum(mx.abs(y).max(), 1.0)).item())


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) of every linear module inside a transformer block."""
    shapes = {}
    for path, module in model.named_modules():
        if ".layers." not in path or not isinstance(module, nn.Linear | nn.QuantizedLinear):
            continue
        out, width = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            width = width * 32 // module.bits
        shapes[path] = (int(width), int(out))
    return shapes


def _shared_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """The longest common token prefix that ends before any position that predicts a target."""
    if len(examples) < 2:
        return ()
    limit = min(example.first_target for example in examples) - 1
    first = examples[0].tokens
    n = 0
    while n < limit and all(example.tokens[n] == first[n] for example in examples):
        n += 1
    return first[:n] if n >= 4 else ()
