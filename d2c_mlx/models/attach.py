"""Attaching an adapter to a stock mlx-lm model in place, and taking it off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.models.stock import linear_shapes

__all__ = ["switch"]

# Layers that mlx-lm puts in place of the model's own, which they keep as `linear` or `embedding`.
_LINEAR, _EMBEDDING = (LoRALinear, LoRASwitchLinear, DoRALinear), (LoRAEmbedding, DoRAEmbedding)


def switch(model: Any, adapter: Adapter | None, where: Path) -> None:  # noqa: ANN401  any nn.Module
    """Replace the LoRAs of an mlx-lm model in place; base weights are neither read nor copied.

    For models that stock mlx-lm runs; `BaseModel.attach` is for evaluation. A prompt cache from
    before holds keys and values of the old adapter: begin a new one.

    Args:
        model: from `mlx_lm.load` or `d2c_mlx.load`. LoRAs and DoRAs that it has are dropped.
        adapter: None leaves the base model.
        where: the file or pack to name in messages.

    Raises:
        AdapterError: the adapter is of another base model; the model stays as it was.
    """
    # The model is walked once, because a walk takes half as long as all the rest.
    modules = dict(model.named_modules())
    if adapter:
        # A LoRA of mlx-lm keeps the model's own linear module as `linear`.
        found = linear_shapes(modules.items())
        shapes = {path.removesuffix(".linear"): shape for path, shape in found.items()}
        check_adapter(adapter, shapes, where)
    changed = {path: m.linear for path, m in modules.items() if isinstance(m, _LINEAR)}
    changed |= {path: m.embedding for path, m in modules.items() if isinstance(m, _EMBEDDING)}
    for path, lora in adapter.modules.items() if adapter else ():
        layer, linear = modules[path], changed.pop(path, modules[path])
        # Ours have no dropout, so the next adapter's factors can take their place.
        if not (isinstance(layer, LoRALinear) and isinstance(layer.dropout, nn.Identity)):
            layer = changed[path] = LoRALinear.from_base(linear, r=lora.rank)
            layer.dropout = nn.Identity()
            layer.eval()
        layer.lora_a, layer.lora_b, layer.scale = lora.a, lora.b, lora.scale
    if changed:
        model.update_modules(tree_unflatten(list(changed.items())))
    if adapter:
        mx.eval([(lora.a, lora.b) for lora in adapter.modules.values()])
