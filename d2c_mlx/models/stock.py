"""A model as stock mlx-lm loads it and takes an adapter; and what its modules tell."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.utils.device import use_device
from d2c_mlx.utils.errors import ModelError

# For mlx-lm's `load`. Left unsaid, transformers would ask whether to run code of the directory.
WITHOUT_CODE: dict[str, Any] = {
    "trust_remote_code": False,
    "tokenizer_config": {"trust_remote_code": False},
}
# Suffixes of a model's files of text, and most bytes of one: tokenizers have up to 40 MB.
TEXTS, _MOST_TEXT = (".json", ".jinja", ".model", ".txt", ".tiktoken"), 256 << 20


def load_stock(path: Path, lazy: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer as mlx-lm loads them, on the device of `use_device`.

    Use it where stock mlx-lm's behaviour is needed; everything else uses `Model`. If `lazy`,
    weights are read only when they are used.

    Raises:
        ModelError: mlx-lm cannot load it without code from the directory, or at all.
    """
    use_device()
    problems = []
    # mlx-lm and transformers would read pipes, devices and vast text without an end.
    for file in sorted(path.iterdir()):
        if file.exists() and file.suffix in (*TEXTS, ".safetensors"):
            if not file.is_file():
                problems.append(f"{file}: is no regular file, expected one of a model")
            elif file.suffix in TEXTS and file.stat().st_size > _MOST_TEXT:
                problems.append(
                    f"{file}: {file.stat().st_size:,} bytes, at most {_MOST_TEXT:,} are read;"
                    " download it again"
                )
    if problems:
        raise ModelError(problems)
    try:
        return load(str(path), lazy=lazy, **WITHOUT_CODE)
    except Exception as error:  # strangers' code on strangers' files
        reason = (str(error).strip() or "it says no more").splitlines()[0]
        if "custom code" in reason or "custom module" in reason:
            raise ModelError(
                f"{path}: needs Python code from this directory (auto_map or model_file), which is"
                " never run; give a model of a family that mlx-lm has"
            ) from None
        reason = f"{type(error).__name__}: {reason}"
        raise ModelError(f"{path}: mlx-lm cannot load it ({reason})") from None


def linear_shapes(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) of each linear module in a block, of a model's `named_modules()`."""
    shapes = {}
    for path, module in modules:
        if ".layers." not in path or not isinstance(module, nn.Linear | nn.QuantizedLinear):
            continue
        out, width = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            width = width * 32 // module.bits
        shapes[path] = (int(width), int(out))
    return shapes


def dense_weight(module: nn.Module) -> mx.array:
    """The weight `(out, in)` of a linear module or an embedding in float32, dequantized."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    packed = module.weight, module.scales, module.get("biases")
    return mx.dequantize(*packed, module.group_size, module.bits, module.mode).astype(mx.float32)


def stored_dtype(model: nn.Module) -> mx.Dtype | None:
    """The dtype of a model's activations: that of its norms, which are never quantized.

    The last norm is not called `norm` in every architecture, so any other one will do; None if
    there is none.
    """
    weights = dict(tree_flatten(model.parameters()))
    norms = [name for name in weights if re.search(r"norm[^.]*\.weight$", name)]
    dtypes = [weights[name].dtype for name in ("model.norm.weight", *norms) if name in weights]
    return next((dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)), None)


def switch(model: Any, adapter: Adapter | None, where: Path) -> None:  # noqa: ANN401  any nn.Module
    """Replace the LoRAs of an mlx-lm model in place; base weights are neither read nor copied.

    For models that stock mlx-lm runs; `Model.attach` is for evaluation. A prompt cache from
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
        linears = linear_shapes(modules.items())
        shapes = {path.removesuffix(".linear"): shape for path, shape in linears.items()}
        check_adapter(adapter, shapes, where)
    # Layers of mlx-lm's tuner keep the model's own as `linear` or `embedding`.
    changed = {path: m.get("linear", m.get("embedding")) for path, m in modules.items()
               if type(m).__module__.startswith("mlx_lm.tuner.")}  # fmt: skip
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
