"""A base model as stock mlx-lm runs it on a device: weights as quantized, adapters beside them.

`Model` is not used here: on a CPU it dequantizes to float32, and a phone would not. The
held-out losses of both come from the same `bench_methods`, so they differ by their base alone.
Adapters are never fused: mlx-lm's `fuse` quantizes the sum again, which destroys small deltas.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load_config, quantize_model, save

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import batches_by_length, pad_batch, sums_by_row
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.models.examples import ExampleSet, context_length
from d2c_mlx.models.kernels import target_scores, use_fast_exponentials
from d2c_mlx.models.resolve import cached_model, resolve_model, weights_digest
from d2c_mlx.models.stock import greedy_batch, linear_shapes, load_stock, stored_dtype, switch
from d2c_mlx.utils.device import on_cpu
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import fingerprint, hash_file, read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = ["StockModel", "quantized_model"]

# Padded tokens of one batch: their logits are the largest array of an evaluation.
_BATCH_TOKENS = 256
# Files beside the weights that are copied with them or decide how they are read: config, tokenizer
# in any of its forms, chat template. They are small enough to be hashed.
_SIDE_FILES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


class StockModel:
    """A model loaded by mlx-lm, with mlx-lm's own LoRA layers, one adapter at a time.

    It is a `Runner` of `evaluate.scorer` too. On a CPU, activations and scales are float32:
    MLX's CPU backend is more than ten times slower in 16 bit. Weights are as quantized everywhere.

    Attributes:
        path: mlx-lm directory.
        model: the mlx-lm model, its weights read.
        tokenizer: mlx-lm's.
        config: content of config.json.
        module_shapes: path of each linear module -> (inputs, outputs).
        weights_nbytes: bytes of the weights as stored.
        dtype: dtype of activations on the device; None if the architecture does not say.
        compute_dtype: dtype of activations here.
    """

    def __init__(self, path: Path) -> None:
        """Load the model; raises ModelError if mlx-lm cannot."""
        self.path = path
        self.model, self.tokenizer = load_stock(path, lazy=True)
        self.config = load_config(path)
        # An `Engine` in this process may have replaced mlx-lm's functions by those of d2c-mlx.
        use_fast_exponentials(self.model, False)
        self.module_shapes = linear_shapes(self.model.named_modules())
        self.weights_nbytes = self.held_nbytes
        self.dtype: mx.Dtype | None = stored_dtype(self.model)
        self.compute_dtype = self.dtype
        if on_cpu():
            self.compute_dtype = mx.float32
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.model.layers)

    @property
    def bits(self) -> int | None:
        """Bits of most weights; None if they are not quantized."""
        return (self.config.get("quantization") or {}).get("bits")

    @property
    def held_nbytes(self) -> int:
        """Bytes of the weights and the attached adapter in this process."""
        return sum(x.nbytes for _, x in tree_flatten(self.model.parameters()))

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config.get("vocab_size") or len(self.tokenizer))

    @property
    def max_tokens(self) -> int | None:
        """Positions that the model was made for; None if it does not say."""
        return context_length(self.config)

    @property
    def file_nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.path.glob("model*.safetensors"))

    def attach(self, adapter: Adapter | None) -> None:
        """Replace the attached adapter, beside the weights; None leaves the base alone."""
        switch(self.model, adapter and adapter.uniform(self.compute_dtype), self.path)

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """The greedy answers to token ids, see `greedy_batch`."""
        return greedy_batch(self.model, self.tokenizer, prompts, max_tokens)

    def kv_nbytes(self, n_tokens: int, dtype: mx.Dtype | None) -> int | None:
        """Bytes of mlx-lm's KV cache that holds `n_tokens` of one prompt, from shapes alone.

        None if the model's cache is not mlx-lm's plain one, or `dtype` is None.
        """
        plain = all(type(cache) is KVCache for cache in make_prompt_cache(self.model))
        names = ("k_proj", "v_proj")
        widths = [s[1] for p, s in self.module_shapes.items() if p.split(".")[-1] in names]
        if dtype is None or not plain or len(widths) != 2 * self.n_layers:
            return None
        # The cache grows by whole steps.
        tokens = -(-n_tokens // KVCache.step) * KVCache.step
        return sum(widths) * tokens * dtype.size

    def fingerprint(self, examples: ExampleSet) -> str:
        """Key of the weights' path and the rows; nothing is kept beyond this process."""
        return fingerprint([str(self.path), examples.digest])

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, np.ndarray]]:
        """Evaluate pieces; yields (index of the piece, `(n_rows,)` NLL of its rows in nats)."""
        for i, (adapter, examples) in enumerate(pieces):
            self.attach(adapter)
            rows, sums = examples.examples, np.empty(len(examples.examples))
            for members in batches_by_length([len(row.tokens) for row in rows], _BATCH_TOKENS):
                batch = [rows[j] for j in members]
                # Padded rows, full logits, no cache.
                x, places, targets = pad_batch(batch)
                normaliser, gold = target_scores(self.model(x)[places], targets, fast=False)
                sums[members] = sums_by_row(np.array(normaliser - gold, np.float64), batch)
            yield i, sums


def quantized_model(spec: str | None, bits: int | None) -> tuple[str, Path, Path]:
    """Find a base model, quantized as asked.

    A model that is not quantized yet is quantized by mlx-lm's `quantize_model`, once, into the
    cache.

    Args:
        spec: see `models.resolve.resolve_model`.
        bits: 4 or 8; None takes the model as it is.

    Returns:
        Its name, its mlx-lm directory, and the directory of the quantized model.

    Raises:
        ModelError: no such model, it has other bits already, or no group size divides its widths.
    """
    name, path = resolve_model(spec)
    try:
        config = parse_json(read_text(path / "config.json"))
        stored = config.get("quantization", config.get("quantization_config"))
        stored_bits = stored and stored.get("bits", "unknown")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path / 'config.json'}: expected a JSON object, in it quantization as one ({error});"
            " download it again"
        ) from None
    if bits is None or stored_bits == bits:
        return name, path, path
    if stored:
        raise ModelError(
            f"{path}: its weights have {stored_bits} bits already, expected weights that are not"
            f" quantized for --bits {bits}; leave --bits out"
        )
    beside = [
        (file.name, hash_file(file))
        for file in sorted(path.iterdir())
        if file.suffix in _SIDE_FILES and file.is_file()
    ]
    parts = [weights_digest(path), beside, bits, version("mlx-lm"), "v3"]
    return name, path, cached_model(f"{path.name}-{bits}bit", parts, partial(_quantize, path, bits))


def _quantize(path: Path, bits: int, directory: Path) -> None:
    """Write a model of `bits` a weight; groups have mlx-lm's default size if it fits, else 32."""
    model, tokenizer = load_stock(path, lazy=True)
    widths = sorted({width for width, _ in linear_shapes(model.named_modules()).values()})
    sizes = [size for size in (64, 32) if all(width % size == 0 for width in widths)]
    if not sizes:
        raise ModelError(
            f"{path}: no group size divides all of its widths ({', '.join(map(str, widths))}),"
            " expected multiples of 32; give a model that is quantized already"
        )
    with contextlib.redirect_stdout(sys.stderr):
        model, config = quantize_model(model, load_config(path), sizes[0], bits)
        save(directory, path, model, tokenizer, config)
