"""The base model, loaded once: it tokenizes rows, and adapters are swapped in place."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import ArraysCache, make_prompt_cache
from mlx_lm.utils import dequantize_model

from d2c_mlx.adapters.adapter import Adapter, LoRA, balance_factors
from d2c_mlx.models.examples import ExampleSet, context_length, encode
from d2c_mlx.models.forward import KeysValues, parts_are_exact
from d2c_mlx.models.resolve import config_digest, resolve_model, weights_digest
from d2c_mlx.models.rows import Row
from d2c_mlx.models.stock import dense_weight, linear_shapes, load_stock, stored_dtype
from d2c_mlx.utils.device import current_device, on_cpu
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.files import fingerprint, hash_file, read_text

# Part of every fingerprint, and so of every key of a cached loss: raise it when a change of the
# engine changes losses.
_ENGINE = 6


class _AdaptedLinear(nn.Module):
    """A linear module with room for LoRAs: `linear(x) + (x @ a) @ b`.

    With n LoRAs, `a (n, in, r)` and `b (n, r, out)`, the rows of `x` are n equal parts, or have
    those that `rows (n_rows,)` names. With `folded`, the sum of the linear module's weight and one
    LoRA, `(out, in)`, that is used instead.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.factors: tuple[mx.array, mx.array] | None = None
        self.rows: mx.array | None = None
        self.folded: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.folded is not None:
            y = x @ self.folded.T
            return y + self.linear.bias if "bias" in self.linear else y
        y = self.linear(x)
        if self.factors is None:
            return y
        a, b = self.factors
        if self.rows is not None:
            update = mx.gather_mm(x, a, rhs_indices=self.rows)
            return y + mx.gather_mm(update, b, rhs_indices=self.rows).astype(y.dtype)
        update = (x.reshape(a.shape[0], -1, a.shape[1]) @ a) @ b
        return y + update.reshape(y.shape).astype(y.dtype)


class Model:
    """A base model with swappable adapters.

    `Engine` evaluates losses on it. To generate with stock mlx-lm, use `d2c_mlx.load` instead.

    Attributes:
        spec: the model as the user named it; None is the default.
        name: the model's name, see `resolve_model`.
        path: its mlx-lm directory.
        model: the mlx-lm model.
        tokenizer: the mlx-lm tokenizer.
        dtype: the dtype of its activations as stored; packs are written in it.
        compute_dtype: the dtype that it computes in here.
        module_shapes: module path -> (in, out) of every linear module in a block.
        first_adapted_block: index of the first block that an attached adapter changes.
    """

    def __init__(self, spec: str | None = None, dequantize: bool | None = None) -> None:
        """Load a base model; on a CPU device weights become float32, which is fast and exact there.

        Args:
            spec: see `resolve_model`.
            dequantize: replace quantized weights; None does so on a CPU alone.

        Raises:
            ModelError: it cannot be found, or mlx-lm cannot load it.
        """
        self.spec = spec
        self.name, self.path = resolve_model(spec)
        model, self.tokenizer = load_stock(self.path, lazy=True)
        self.dtype: mx.Dtype = stored_dtype(model) or mx.float16
        self.compute_dtype = self.dtype
        if on_cpu():
            self.compute_dtype = mx.float32
            model.set_dtype(mx.float32)
        if on_cpu() if dequantize is None else dequantize:
            model = dequantize_model(model)
        # The largest first, while there is room for its stored form beside it.
        weights = [weight for _, weight in tree_flatten(model.parameters())]
        for weight in sorted(weights, key=lambda weight: -weight.nbytes):
            mx.eval(weight)
        self.model = model
        self.module_shapes = linear_shapes(model.named_modules())
        self.first_adapted_block = self.n_layers
        self._slots: dict[str, _AdaptedLinear] = {}
        self._exact: dict[tuple[int, ...], bool] = {}

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.model.layers)

    @cached_property
    def dimensions(self) -> tuple[int, int]:
        """Hidden size and vocabulary size."""
        tables = [(len(self.tokenizer), max(width for width, _ in self.module_shapes.values()))]
        for _, module in self.model.named_modules():
            if isinstance(module, nn.QuantizedEmbedding):
                tables.append((module.num_embeddings, module.dims))
            elif isinstance(module, nn.Embedding):
                tables.append(module.weight.shape)
        n_tokens, width = max(tables[1:] or tables)
        return width, n_tokens

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return json.loads(read_text(self.path / "config.json"))

    @cached_property
    def config_hash(self) -> str:
        """Hex SHA-256 of the model's config.json, whatever its form."""
        return config_digest(self.path)

    @cached_property
    def weights_hash(self) -> str:
        """Hex SHA-256 of the model's weights as they are stored."""
        return weights_digest(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of engine, mlx-lm, config, weights, and files that losses or answers need."""
        # The architecture's code is mlx-lm's; it looks in generation_config.json for what ends
        # answers.
        software = [_ENGINE, version("mlx-lm"), str(self.compute_dtype)]
        texts = [*self.path.glob("token*.json"), *self.path.glob("generation_config.json")]
        files = [[file.name, hash_file(file)] for file in sorted(texts)]
        return fingerprint([*software, self.config_hash, self.weights_hash, files])

    def encode(self, task: str, rows: Sequence[Row]) -> ExampleSet:
        """Tokenize rows of one format by `examples.encode`, with the model's context length."""
        return encode(self.tokenizer, task, rows, context_length(self.model.args))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        adapters: Sequence[Adapter | None],
    ) -> list[tuple[int, ...]]:
        """Generate the most likely token each time, for all prompts in one batch.

        Prompts are padded, so that an answer may differ from the one alone where two tokens are as
        likely but for rounding. The bare base model is there after it.

        Args:
            prompts: token ids.
            max_tokens: most tokens of each answer, which are token ids too, without end tokens.
            adapters: what each prompt is answered under; None is the base model.
        """
        asked, stream = [list(prompt) for prompt in prompts], mx.default_stream(current_device())
        digests = [adapter.digest if adapter else "base" for adapter in adapters]
        distinct = dict(zip(digests, adapters))
        options: Any = {"max_tokens": [*max_tokens], "return_token_ids": True, "stream": stream}
        # Which adapter a row has is one more entry of its cache, which stays with it in any batch.
        caches = []
        for digest in digests:
            number = ArraysCache(1)
            number[0] = mx.array([[*distinct].index(digest)])
            caches.append([*make_prompt_cache(self.model), number])

        def mixed(tokens: mx.array, cache: Sequence[Any]) -> mx.array:
            *layers, numbers = cache
            for slot in self._slots.values():
                slot.rows = numbers[0]
            return self.model(tokens, cache=layers)

        try:
            with self.attached(*distinct.values()), all_cores():
                batch = batch_generate(mixed, self.tokenizer, asked, caches, **options)
            return [tuple(tokens) for tokens in batch.token_ids]
        except ValueError:  # a kind of cache that mlx-lm cannot batch
            answers, ends = [], self.tokenizer.eos_token_ids
            for prompt, most, adapter in zip(asked, max_tokens, adapters):
                with self.attached(adapter):
                    steps = generate_step(mx.array(prompt), self.model, stream, max_tokens=most)
                    tokens = (int(token) for token, _ in steps)
                    answers.append((*takewhile(lambda x: x not in ends, tokens),))
            return answers

    @property
    def can_fold(self) -> bool:
        """True if a LoRA added to a weight loses nothing: float32 weights, none quantized."""
        return self.compute_dtype == mx.float32 and not any(
            isinstance(module, nn.QuantizedLinear) for module in self.model.modules()
        )

    def weight(self, path: str) -> mx.array | None:
        """The weight of a module in float32, dequantized; None if the model has no such module."""
        module = dict(self.model.named_modules()).get(path)
        module = module.linear if isinstance(module, _AdaptedLinear) else module
        return None if module is None or "weight" not in module else dense_weight(module)

    @contextmanager
    def attached(self, *adapters: Adapter | None, fold: bool = False) -> Iterator[None]:
        """`attach` adapters inside the block; the bare base model is there after it."""
        self.attach(*adapters, fold=fold)
        try:
            yield
        finally:
            self.attach(None)

    def attach(self, *adapters: Adapter | None, fold: bool = False) -> None:
        """Put adapters in place of those attached before.

        Args:
            adapters: at least one; None is the bare base model. Several divide a batch into as many
                equal parts, in their order.
            fold: add a single adapter to copies of the weights; only where `can_fold`.
        """
        modules = {path for adapter in adapters if adapter for path in adapter.modules}
        self.first_adapted_block = min(map(block_index, modules), default=self.n_layers)
        new = sorted(modules - self._slots.keys())
        if new:
            linears = dict(self.model.named_modules())
            slots = {path: _AdaptedLinear(linears[path]) for path in new}
            self.model.update_modules(tree_unflatten(list(slots.items())))
            self._slots |= slots
        for path, slot in self._slots.items():
            slot.factors = self.stacked_factors(path, adapters) if path in modules else None
            slot.rows = slot.folded = None
            if fold and slot.factors is not None:
                (a,), (b,) = slot.factors
                slot.folded = slot.linear.weight + (a @ b).T
        # This thread evaluates them now, because threads with streams of their own will read them.
        mx.eval([(slot.factors, slot.folded) for slot in self._slots.values()])

    def runs_in_parts(self, cuts: Sequence[int] = (), prefix: bool = True) -> bool:
        """`parts_are_exact` of this model, which is tried once for the same arguments."""
        key = (*cuts, prefix)
        if key not in self._exact:
            self._exact[key] = parts_are_exact(self.model, cuts, prefix)
        return self._exact[key]

    @property
    def attached_factors(self) -> dict[str, KeysValues]:
        """Module path -> factors of the attached adapters."""
        return {path: slot.factors for path, slot in self._slots.items() if slot.factors}

    @contextmanager
    def replaced_factors(self, factors: Sequence[KeysValues]) -> Iterator[None]:
        """Use other arrays in place of `attached_factors` inside the block, for `mx.grad` to trace.

        There is one pair per module, in their order.
        """
        own = self.attached_factors
        for path, other in zip(own, factors):
            self._slots[path].factors = other
        try:
            yield
        finally:
            for path, mine in own.items():
                self._slots[path].factors = mine

    def stacked_factors(self, path: str, adapters: Sequence[Adapter | None]) -> KeysValues:
        """The factors of n adapters for one module, in the dtype of computation.

        An adapter may lack the module, or be None.

        Returns:
            `a (n, in, r)` and `b (n, r, out)`, scales folded into b and smaller ranks padded.
        """
        width, out = self.module_shapes[path]
        zero = LoRA(mx.zeros((width, 1)), mx.zeros((1, out)))
        loras = [adapter.modules.get(path, zero) if adapter else zero for adapter in adapters]
        rank = max(lora.rank for lora in loras)
        a, b = [], []
        for lora in loras:
            pad = rank - lora.rank
            left, right = lora.a.astype(mx.float32), lora.b.astype(mx.float32) * lora.scale
            if self.compute_dtype == mx.float16:
                left, right = balance_factors(left, right)
            a.append(mx.pad(left, [(0, 0), (0, pad)]))
            b.append(mx.pad(right, [(0, pad), (0, 0)]))
        return mx.stack(a).astype(self.compute_dtype), mx.stack(b).astype(self.compute_dtype)


def block_index(path: str) -> int:
    """Index of the transformer block that a module path names."""
    return int(path.split(".layers.")[1].split(".")[0])
