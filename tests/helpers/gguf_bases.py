"""Tiny random models in GGUF as llama.cpp would convert them, and what torch makes of them.

A program of its own, `gguf_bases.py DIR`, for the reason that families.py gives. Tensors have
blocks of random bytes, so that every type is there that the `gguf` package cannot write.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    dequantize,
    get_tensor_name_map,
)

COMMON = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# No file states query_pre_attn_scalar, which is 256 in transformers, as is 128 for Qwen3's heads.
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8}
SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
# mlx-lm has no window for Gemma 2. Name -> (config class, options, general.architecture,
# pre-tokenizer or None for SentencePiece, True if transformers reads the file).
BASES = {
    "Llama": ("LlamaConfig", {}, "llama", "smaug-bpe", True),
    "Llama 3": ("LlamaConfig", {"rope_parameters": SCALED, "max_position_embeddings": 131072},
                "llama", "llama-bpe", False),
    "Mistral": ("MistralConfig", {"sliding_window": None}, "llama", None, True),
    "Qwen2": ("Qwen2Config", {}, "qwen2", "qwen2", True),
    "Qwen3": ("Qwen3Config", {"head_dim": 128}, "qwen3", "qwen2", True),
    "Gemma 2": ("Gemma2Config", {**GEMMA, "sliding_window": 64}, "gemma2", None, True),
    "Gemma 3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6}, "gemma3", None, True),
    "Phi-3": ("Phi3Config", {"sliding_window": None}, "phi3", None, True),
    "SmolLM3": ("SmolLM3Config", {"num_hidden_layers": 4}, "smollm3", "smaug-bpe", False),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"],
                            "block_auto_adjust_ff_dim": False}, "lfm2", "lfm2", True),
    "Granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                  "attention_multiplier": 0.1, "logits_scaling": 2.0},
                "granite", "refact", False),
    "OLMo 2": ("Olmo2Config", {}, "olmo2", "dbrx", False),
}  # fmt: skip
TYPES = ("Q4_K", "Q6_K", "Q5_0", "Q8_0", "Q5_K", "Q3_K", "Q4_0", "Q2_K", "Q5_1", "F16", "IQ4_XS")
# Bytes of a block where a float16 scale lies.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
TOKENS = np.arange(1, 25)[None] * 7 % 250
TEXTS = ["the cat sat on 2026 mats,  the end\n\n", " then  it's <|end|> that", "naïve 日本 café"]


def blocks(kind, shape, rng, size=0.05):
    """Random bytes of a type, `(out, bytes)`, whose values are about `size`."""
    kind = GGMLQuantizationType[kind]
    width, nbytes = GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16", "BF16"):
        x = (size * rng.normal(size=shape)).astype(np.float32)
        high = (x.view(np.uint32) >> 16).astype(np.uint16)
        return {"F32": x, "F16": x.astype(np.float16)}.get(kind.name, high.view(np.uint8))
    n = shape[0] * shape[1] // width
    blocks = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    for _ in range(2):
        with np.errstate(all="ignore"):
            values = dequantize(blocks, kind)
        wrong = ~np.isfinite(values).all(axis=1) | (np.abs(values) > 60000).any(axis=1)
        blocks[wrong] = blocks[~wrong][0]
        # First any scale that is finite, then the one that gives the size.
        rms = np.sqrt(np.mean(dequantize(blocks, kind)[:8] ** 2)) if _ else 1.0
        for at in SCALES.get(kind.name, ()):
            scale = np.float16(size / max(rms, 1e-9) if _ else 1.0)
            # The minimum of a block centres its values.
            scale = scale * np.float16(_CENTRE.get((kind.name, at), 1.0))
            blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


_CENTRE = {("Q4_1", 2): -7.5, ("Q5_1", 2): -15.5, ("Q4_K", 2): 7.5, ("Q5_K", 2): 15.5,
           ("Q2_K", 82): 1.5}  # fmt: skip


def rows_of(architecture, name, x, config, back=False):
    """llama.cpp's change of a tensor; `back` undoes it."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    n = heads.get(name.split(".")[-2])
    if architecture in ("llama", "smollm3", "granite") and n:
        first, second = (-1, 2) if back else (2, -1)
        x = x.reshape(n, first, second, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        x = x - 1 if back else x + 1
    return x


def metadata(writer, config, architecture, pre, tokenizer):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) if architecture == "lfm2" else None
    n = config.num_key_value_heads
    writer.add_head_count_kv([n if k == "full_attention" else 0 for k in kinds] if kinds else n)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or config.norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_logit_scale(config.logits_scaling)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    vocabulary(writer, pre, tokenizer)


def vocabulary(writer, pre, n):
    """`n` tokens: SentencePiece's, or those of a byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<pad>", "<s>", "</s>", "<|end|>"]
    words = ["he", "th", "the", "at", "ca", "cat", "on", "en", "end"]
    if pre is None:
        plain = [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", *"thecasonmd"]
        words = [*words, "\u2581t", "\u2581the"]
    else:
        plain = list(bytes_to_unicode().values())
        words = [*words, "\u0120t", "\u0120the"]
    tokens = list(dict.fromkeys(special + plain + words))
    kinds = [3] * 4 + [6 if t.startswith("<0x") else 1 for t in tokens[4:]]
    tokens += [f"<unused{i}>" for i in range(n - len(tokens))]
    kinds += [3] * (n - len(kinds))
    writer.add_tokenizer_model("llama" if pre is None else "gpt2")
    writer.add_tokenizer_pre("default" if pre is None else pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pre is None:
        writer.add_token_scores([-float(i) for i in range(n)])
        writer.add_unk_token_id(0)
    else:
        writer.add_token_merges(["t h", "th e", "a t", "c a", "ca t", "o n", "e n", "en d",
                                 "\u0120 t", "\u0120t he"])  # fmt: skip
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(pre is None)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_base(path, model, architecture, pre, rng):
    """Write the GGUF, and put its values into the torch model."""
    import torch

    config = model.config
    writer = GGUFWriter(path, architecture)
    metadata(writer, config, architecture, pre, config.vocab_size)
    arch = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    # What transformers reads LFM2 with lacks two.
    types = [kind for kind in TYPES if architecture != "lfm2" or kind not in ("Q5_0", "Q5_1")]
    n_matrices = 0
    for name, x in model.named_parameters():
        if name == "lm_head.weight" and tied:
            continue
        module, _, leaf = name.rpartition(".")
        name = f"{names.get_name(module)}.{leaf}"
        if x.ndim == 2:
            kind = types[n_matrices % len(types)]
            n_matrices += 1
            data = blocks(kind, tuple(x.shape), rng)
            raw = GGMLQuantizationType[kind]
            writer.add_tensor(name, data, raw_dtype=raw)
            values = dequantize(data, raw)
            values = rows_of(architecture, name, values, config, back=True)
        else:
            start = 1.0 if "norm" in name and not architecture.startswith("gemma") else 0.0
            noise = torch.from_numpy(rng.normal(size=tuple(x.shape)).astype(np.float32))
            values = (start + 0.1 * noise).bfloat16().float().numpy()
            data = rows_of(architecture, name, values, config).astype(np.float32)
            writer.add_tensor(name, data.squeeze(1) if data.ndim == 3 else data)
        with torch.no_grad():
            x.copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))
    if config.rope_parameters.get("rope_type") == "llama3":
        # As llama.cpp has it: what frequencies are divided by.
        width = config.hidden_size // config.num_attention_heads
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(root):
    """`<family>/model.gguf`, and `known.npz`: logits and tokens of torch and transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokens = torch.tensor(TOKENS)
    for i, (family, (kind, options, architecture, pre, read)) in enumerate(BASES.items()):
        torch.manual_seed(i)
        config = getattr(transformers, kind)(**{**COMMON, **options})
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        (root / family).mkdir()
        write_base(root / family / "model.gguf", model, architecture, pre, np.random.default_rng(i))
        with torch.inference_mode():
            results = {"torch": model(tokens).logits.numpy()}
            if read:  # its reader passes over rope_freqs
                stock = transformers.AutoModelForCausalLM.from_pretrained(
                    root / family, gguf_file="model.gguf", dtype=torch.float32,
                    attn_implementation="eager",
                ).eval()  # fmt: skip
                results["transformers"] = stock(tokens).logits.numpy()
        if read or architecture == "llama":
            its = transformers.AutoTokenizer.from_pretrained(root / family, gguf_file="model.gguf")
            texts = {f"text {i}": its(text)["input_ids"] for i, text in enumerate(TEXTS)}
            results |= {name: np.array(ids) for name, ids in texts.items()}
        np.savez(root / family / "known.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
