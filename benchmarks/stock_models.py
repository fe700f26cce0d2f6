"""The base model as other libraries hold it, with float32 weights: mlx-lm, transformers, PEFT."""

import json
import shutil

import mlx.core as mx
from mlx_lm.utils import dequantize_model, load, save_model


def float32_base(base, directory):
    """Write the base as an mlx-lm directory with float32 weights, none quantized."""
    model, _ = load(str(base.path), lazy=True)
    model.set_dtype(mx.float32)
    save_model(directory, dequantize_model(model))
    config = json.loads((base.path / "config.json").read_text())
    config.pop("quantization", None)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base.path / name).exists():
            shutil.copyfile(base.path / name, directory / name)


def torch_base(base, directory):
    """The same float32 weights in transformers."""
    from transformers import AutoModelForCausalLM

    float32_base(base, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32")


def torch_model(base, paths, directory):
    """The float32 base in PEFT, every adapter loaded under its name."""
    from peft import PeftModel

    model = torch_base(base, directory)
    model = PeftModel.from_pretrained(model, paths[0], adapter_name=paths[0].name)
    for path in paths[1:]:
        model.load_adapter(path, adapter_name=path.name)
    return model.eval()
