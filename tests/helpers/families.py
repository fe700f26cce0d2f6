"""Tiny random models of many families and PEFT adapters of many kinds, made by torch alone.

A program of its own, `families.py DIR`: with our BLAS loaded first (as `d2c_mlx` does on Linux),
torch's batched matmul of some architectures would find the wrong one and crash.
"""

import json
import sys
from pathlib import Path

import numpy as np

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
# Name -> (transformers' config class, what it needs beside COMMON, what mlx-lm needs in addition).
# Published configs have the last, transformers 5 keeps it elsewhere or leaves it out.
FAMILIES = {
    "Llama": ("LlamaConfig", {}, {}),
    "Mistral": ("MistralConfig", {}, {}),
    "Qwen2": ("Qwen2Config", {}, {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}, {}),
    # llama.cpp divides by sqrt(head_dim), whatever query_pre_attn_scalar says.
    "Gemma 2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}, {}),
    # mlx-lm rounds sqrt(hidden_size) to bfloat16: 8 is exact.
    "Gemma 3 text": (
        "Gemma3TextConfig",
        {"hidden_size": 64, "head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
        {},
    ),
    "Phi-3": ("Phi3Config", {}, {}),
    "SmolLM3": ("SmolLM3Config", {"num_hidden_layers": 4}, {}),
    "StableLM 2": ("StableLmConfig", {"use_qkv_bias": True}, {}),
    "LFM2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        {"block_dim": 32},
    ),
    "Granite": ("GraniteConfig", {}, {}),
    "OLMo 2": ("Olmo2Config", {}, {}),
}
# Name -> (options of LoraConfig, words of the refusal if it is refused).
FEATURES = {
    "all linear": ({}, None),
    "rsLoRA": ({"use_rslora": True}, None),
    "rank, alpha patterns": (
        {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r"layers\.2\..*": 7}},
        None,
    ),
    "some blocks": ({"target_modules": r".*layers\.1\..*(proj|w1|w2)"}, None),
    "DoRA": ({"use_dora": True}, "use_dora is True, expected none: a DoRA scales each row"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "whole modules": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
}
TOKENS = np.arange(1, 25)[None] * 7 % 250


# LoRAs of a vision-language model, by their names: of its text model alone, and of all its parts.
VISION = {
    "text": {"target_modules": r".*language_model.*(q|v)_proj"},
    "all": {"target_modules": "all-linear"},
}


def randomize(model):
    """Weights that no module could do without."""
    import torch

    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.2 * torch.randn_like(x) if x.ndim > 1 else x + 0.1 * torch.randn_like(x))
    return model.eval()


def save_model(model, directory, extra):
    """In the layout of published models."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    rope = saved.get("rope_parameters") or {}
    plain = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
    path.write_text(json.dumps({**saved, **plain, **extra}))


def save_adapters(root, model, features):
    """A random adapter of every kind, and `logits.npz` of all and of the base."""
    import torch
    from peft import LoraConfig, get_peft_model

    tokens = torch.tensor(TOKENS)
    with torch.inference_mode():
        logits = {"base": model(tokens).logits.numpy()}
        for feature, changes in features.items():
            torch.manual_seed(1)
            lora = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **changes}
            options = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
            peft = get_peft_model(model, options).eval()
            for name, x in peft.named_parameters():
                # PEFT begins with the rows' own lengths, and then nothing is scaled.
                if "magnitude" in name:
                    x.data *= 1 + 0.2 * torch.randn_like(x)
            peft.save_pretrained(root / feature)
            logits[feature] = peft(tokens).logits.numpy()
            model = peft.unload()
    np.savez(root / "logits.npz", **logits)


def vision(root):
    """A vision-language model with two adapters."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = {**COMMON, **FAMILIES["Gemma 3 text"][1]}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=image, mm_tokens_per_image=4, attn_implementation="eager"
    )
    model = randomize(transformers.Gemma3ForConditionalGeneration(config).float())
    save_model(model, root / "model", {"vocab_size": text["vocab_size"]})
    save_adapters(root, model, VISION)


def main(root):
    """`<family>/model`, `<family>/<feature>` in PEFT's layout, and `logits.npz` of each."""
    import torch
    import transformers
    from peft import PeftModel

    # A page of words beside each adapter, which nobody reads, takes longer than the adapter.
    PeftModel.create_or_update_model_card = lambda self, directory: None
    for family, (kind, options, extra) in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**COMMON, **options})
        config._attn_implementation = "eager"
        model = randomize(transformers.AutoModelForCausalLM.from_config(config).float())
        save_model(model, root / family / "model", extra)
        save_adapters(root / family, model, {name: make for name, (make, _) in FEATURES.items()})
    vision(root / "vision")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
