"""A base model in other bits, with an adapter added to its weights or without."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, quantize_model, save

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.stock import linear_shapes, load_stock, stored_dtype, switch
from d2c_mlx.utils.gguf_file import pack_codes


class FusedModel:
    """An mlx-lm model in 16 bit, not yet rounded nor written; an adapter may be in its weights.

    Attributes:
        modules: path -> module.
        forms: path -> what it is rounded to, `group_size`, `bits` and `mode` of mlx-lm's config.
        packed: path -> weight, scales, biases and relative error of those not rounded to nearest.
    """

    def __init__(self, path: Path, adapter: Adapter | None, bits: int) -> None:
        """Load the base model in a directory, and add an adapter; 16 bits round nothing.

        Where the base is stored in `bits`, only modules with an update are dequantized and rounded;
        else all are, as `mlx_lm.convert` does.
        """
        model, self.tokenizer = load_stock(path, lazy=True)
        switch(model, adapter and adapter.uniform(mx.float32), path)
        fused = {p: m.fuse(dequantize=True) for p, m in model.named_modules() if hasattr(m, "fuse")}
        model.update_modules(tree_unflatten(list(fused.items())))
        self.model, self.config = model, load_config(path)
        stored, paths = self.config.get("quantization", {}), list(fused)
        size = 32 if any(n % 64 for n, _ in linear_shapes(model.named_modules()).values()) else 64
        if adapter and stored.get("bits") == bits:
            size = stored["group_size"]
        else:
            dequantize_model(model)
            if stored:
                model.set_dtype(stored_dtype(model) or mx.float16)
            self.config = {k: x for k, x in self.config.items() if "quantization" not in k}
            paths = [p for p, m in model.named_modules() if hasattr(m, "to_quantized")]
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.form: dict[str, Any] = {"group_size": size, "bits": bits, "mode": "affine"}
        self.forms = {p: self.form for p in paths if self.modules[p].weight.shape[-1] % size == 0}
        self.packed: dict[str, Any] = {}

    def widen(self, room: int) -> None:
        """Give modules 8 bits, in `room` bytes: first those that are not packed, then by error."""
        for path in sorted(self.forms, key=lambda p: -self.packed.get(p, [np.inf])[-1]):
            cost = self.modules[path].weight.size * (8 - self.form["bits"]) // 8
            if cost <= room:
                room -= cost
                self.forms[path] = self.form | {"bits": 8}
                self.packed.pop(path, None)

    def save(self, directory: Path) -> int:
        """Round and write, once; returns the bytes of the weights' files."""
        forms, form, model, config = self.forms, self.form, self.model, self.config
        options = dict(form, quant_predicate=lambda p, _: forms.get(p) == form or forms.get(p))
        with contextlib.redirect_stdout(sys.stderr):
            if form["bits"] < 16:
                model, config = quantize_model(model, config, **options)
            modules = dict(model.named_modules())
            for path, parts in self.packed.items():
                modules[path].update(dict(zip(("weight", "scales", "biases"), parts)))
            # Not the base's: mlx-lm would copy code from there, and what links show outside of it.
            directory.mkdir(exist_ok=True)
            save(directory, directory, model, self.tokenizer, config)
        return sum(file.stat().st_size for file in directory.glob("model*.safetensors"))


def round_compensated(
    weight: np.ndarray, factor: np.ndarray, form: Mapping[str, Any], dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, float]:
    """Round `weight (out, in)` as `mx.quantize` does, but inputs that are left make up for each.

    `factor (in, in)` is the upper Cholesky factor of the inverse of the inputs' Gram matrix. The
    last of what is returned is the square error of the outputs.

    Source: GPTQ, https://arxiv.org/abs/2210.17323.
    """
    size, bits, rows, affine, lost = form["group_size"], form["bits"], weight.T.copy(), [], 0.0
    codes = np.empty(rows.shape, np.uint8)
    for start in range(0, len(rows), size):
        stop = start + size
        affine += [mx.quantize(mx.array(rows[start:stop].T).astype(dtype), size, bits)[1:]]
        scale, bias = (np.array(x.astype(mx.float32))[:, 0] for x in affine[-1])
        errors = np.empty((size, rows.shape[1]), np.float32)
        for i in range(start, stop):
            codes[i] = np.clip(np.rint((rows[i] - bias) / scale), 0, 2**bits - 1)
            errors[i - start] = (rows[i] - (codes[i] * scale + bias)) / factor[i, i]
            rows[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        rows[stop:] -= factor[start:stop, stop:].T @ errors
        lost += float(np.square(errors).sum())
    scales, biases = (mx.concatenate(parts, axis=1) for parts in zip(*affine))
    return mx.array(pack_codes(codes.T, bits)), scales, biases, lost
