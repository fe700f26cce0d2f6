"""A real but tiny base model, adapters and tasks, written in a moment."""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from scipy.special import log_softmax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 32, 2, 4, 2, 64, 300
# Module -> (in, out), of every transformer block.
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
# Every module of the model.
ALL = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(LAYERS) for name in SHAPES}
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the other foxes are watching.",
    "An answer to a question is the answer that the user and the assistant agree on.",
    "Question one, question two, question three: what is the answer to this question?",
    "There is more than one system that answers the question of the user with another.",
)


class Library(NamedTuple):
    """Paths of a model and of the directories of adapters and tasks."""

    model: Path
    adapters: Path
    tasks: Path


def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Gpu:
    """A device by whose name weights stay as they are stored."""

    type = mx.DeviceType.gpu


def tiny_model(directory, dtype=mx.float16, seed=0, **other):
    """Write an mlx-lm model directory: a random llama of 2 layers and its tokenizer.

    `other` is of its config: a `model_type` of mlx-lm, and what that needs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
        **other,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    family = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = family.Model(family.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, x in tree_flatten(model.parameters()):
        value = np.ones(x.shape) if x.ndim == 1 else rng.normal(0, 0.2, x.shape)
        weights[name] = mx.array(value.astype(np.float32)).astype(dtype)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def quantized(model, directory, bits=4):
    """Write a model in fewer bits, as mlx-lm does."""
    from mlx_lm.utils import load, quantize_model, save

    loaded, tokenizer, config = load(str(model), return_config=True)
    loaded, config = quantize_model(loaded, config, group_size=32, bits=bits)
    save(directory, str(model), loaded, tokenizer, config)
    return directory


def peft_adapter(directory, name, rank=4, alpha=8, seed=0, targets=TARGETS, **overrides):
    """Write `directory/name` in PEFT's layout: float16 factors of `targets` in every layer."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            width, out = SHAPES[target]
            prefix = f"base_model.model.model.layers.{layer}.{target}"
            a, b = rng.normal(0, 0.1, (rank, width)), rng.normal(0, 0.1, (out, rank))
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float16)
    save_file(tensors, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "tiny/llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(target.split(".")[-1] for target in targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps({**config, **overrides}, indent=2)
    (path / "adapter_config.json").write_text(text, encoding="utf-8")
    return path


def edit_json(path, **changes):
    """Set values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def task(directory, name, n_probe=4, n_test=4, rows=None):
    """Write `directory/name/probe.jsonl` and `test.jsonl`, of rows that are all different."""
    path = directory / name
    rows = rows or [
        {"prompt": f"Question {i} of the user: what is {name}?", "completion": f"Answer {i}."}
        for i in range(n_probe + n_test)
    ]
    write_jsonl(path / "probe.jsonl", rows[:n_probe])
    write_jsonl(path / "test.jsonl", rows[n_probe:])
    return path


def library(root, names):
    """Write a model, and an adapter and a task for every name."""
    paths = Library(tiny_model(root / "model"), root / "adapters", root / "tasks")
    for seed, name in enumerate(names):
        peft_adapter(paths.adapters, name, seed=seed)
        task(paths.tasks, name)
    return paths


def log_probabilities(base, adapter, example):
    """`(n_targets, vocabulary)` in float64, from the whole row's logits."""
    base.attach(adapter)
    logits = np.array(base.model(mx.array([example.tokens[:-1]])))[0].astype(np.float64)
    return log_softmax(logits[example.first_target - 1 :], axis=-1)


def divergence(base, teacher, adapter, examples):
    """KL(teacher || adapter), summed over all targets."""
    total = 0.0
    for example in examples.examples:
        p, q = (log_probabilities(base, side, example) for side in (teacher, adapter))
        total += float((np.exp(p) * (p - q)).sum())
    return total


def expected_regret(session, i, adapter):
    """Of task i, from whole rows of logits in float64, and the losses of `losses.json`."""
    library, table = session.library, session.read("losses.json")
    gain, rows = max(table["base"][i] - table["individual"][i], 0.05), library.calibration[i]
    total = divergence(library.base, library.adapters[i], adapter, rows)
    return total / rows.n_targets / gain


def end_answers(model):
    """Let the answers of a model that knows no end stop at one of 40 tokens."""
    edit_json(Path(model) / "config.json", eos_token_id=[*range(40, 80)])


def refinable(root, names=("a", "b")):
    """Two strong adapters of different modules, six probe rows each."""
    inputs = library(root, names)
    for seed, name in enumerate(names):
        peft_adapter(inputs.adapters, name, alpha=40, seed=seed,
                     targets=("self_attn.v_proj", "mlp.down_proj"))  # fmt: skip
        task(inputs.tasks, name, n_probe=6)
    return inputs
