"""Architectures that keep their parts elsewhere, or blocks that forget; prompts that are not cut.

Tiny models of mlx-lm's own classes with random weights; parts are compared with the whole.
"""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import lora_of
from helpers.losses import greedy, losses_of, plain_loss
from helpers.tiny import CHAT_TEMPLATE, SENTENCES, tiny_model, tiny_tokenizer

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, answer_rows
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import method_of
from d2c_mlx.merge.methods import MergeOptions
from d2c_mlx.models import model as model_module
from d2c_mlx.models.forward import find_body, find_head, parts_are_exact, run_blocks, run_prefix
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import Task
from d2c_mlx.serve.router import fit_router
from d2c_mlx.utils import device
from d2c_mlx.utils.errors import ModelError

VOCAB = len(tiny_tokenizer())
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4}  # fmt: skip
GEMMA = {**SIZES, "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 16,
         "sliding_window_pattern": 3, "query_pre_attn_scalar": 8}  # fmt: skip
CONFIGS = {
    "gemma3": {"text_config": GEMMA, "vocab_size": VOCAB},
    "gemma3-narrow": {"text_config": {**GEMMA, "sliding_window": 4}, "vocab_size": VOCAB,
                      "model_type": "gemma3"},
    "mamba2": {"num_heads": 8, "head_dim": 8, "vocab_size": VOCAB, "hidden_size": 32,
               "intermediate_size": 64, "state_size": 16, "num_hidden_layers": 3,
               "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
               "use_conv_bias": True, "tie_word_embeddings": True, "time_step_rank": 4,
               "time_step_limit": [0.0, 100.0]},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_inner": 64, "n_head": 4, "n_positions": 512,
                    "layer_norm_epsilon": 1e-5, "vocab_size": VOCAB},
    "olmo3": {"head_dim": 8, "num_hidden_layers": 5, "sliding_window": 16,
              "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
              "attention_bias": False},
}  # fmt: skip


def model_of(directory, kind):
    """A random model of an architecture."""
    return Model(str(tiny_model(directory, **{"model_type": kind, **CONFIGS[kind]})))


def rows(n=4):
    return [{"prompt": f"Question {i}: {SENTENCES[i % 4]}", "completion": SENTENCES[(i + 1) % 4]}
            for i in range(n)]  # fmt: skip


def adapter_of(base, blocks=range(9)):
    rng = np.random.default_rng(1)
    loras = {path: lora_of(rng, shape, 2, size=0.2) for path, shape in base.module_shapes.items()
             if any(f".layers.{i}." in path for i in blocks)}  # fmt: skip
    return Adapter("a", loras)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*CONFIGS} - {"gpt_bigcode"}))
def test_inputs_losses_and_the_body_are_those_of_the_whole_model(tmp_path, kind):
    base = model_of(tmp_path / "m", kind)
    examples, adapter = base.encode("a", rows()), adapter_of(base)
    (activations,) = input_activations(base, adapter, [examples], sorted(adapter.modules))
    assert activations.keys() == adapter.modules.keys()
    n_tokens = sum(len(row.tokens) for row in examples.examples)
    assert all(np.isfinite(x).all() and len(x) == n_tokens for x in activations.values())
    expected = [plain_loss(base, variant, examples) for variant in (None, adapter)]
    got = losses_of(Engine(base), [(None, examples), (adapter, examples)])
    assert got == pytest.approx(expected, rel=1e-4)
    base.attach(None)
    head, x = find_head(base.model), mx.array([[5, 6, 7, 8]])
    if kind in ("gemma3", "mamba2"):
        exact = parts_are_exact(base.model), parts_are_exact(base.model, [1]), head is not None
        assert exact == (kind == "gemma3",) * 3
        assert fit_router(base.model, [examples, examples]).centre.shape == (32,)
    if kind == "gemma3":
        logits = np.array(base.model(x))
        np.testing.assert_allclose(head(run_blocks(base.model, x)), logits, atol=1e-3)


def by_blocks(base):
    return parts_are_exact(base.model, range(1, base.n_layers), prefix=False)


def test_a_model_without_a_body_is_refused_by_name(tmp_path):
    base = model_of(tmp_path / "m", "gpt_bigcode")
    with pytest.raises(ModelError, match="mlx_lm.models.gpt_bigcode: blocks of this architecture"):
        fit_router(base.model, [base.encode(name, rows()) for name in "ab"])


@pytest.mark.parametrize("kind", ["gemma3", "olmo3"])
def test_windows_embedding_scales_and_all_norms_are_run_in_parts(tmp_path, kind):
    """Rows are longer than the window, and each block has the mask of its own place."""
    base = model_of(tmp_path / "m", kind)
    last = len(base.model.layers) - 1
    examples, adapter = base.encode("a", rows(8)), adapter_of(base, [last - 1, last])
    assert min(len(row.tokens) for row in examples.examples) > 2 * 16
    assert by_blocks(base)
    engine = Engine(base)
    (got,) = losses_of(engine, [(adapter, examples)])
    assert engine._first_block() == last - 1 and base.runs_in_parts()
    assert got == pytest.approx(plain_loss(base, adapter, examples), rel=1e-5)
    x = mx.array([examples.examples[0].tokens])
    base.attach(None)
    prefix, rest = x[:, :5], x[:, 5:]
    for block in range(last + 1):
        prefix, states = run_prefix(base.model, prefix, block, block + 1)
        rest = run_blocks(base.model, rest, states, block, block + 1)
    np.testing.assert_allclose(rest, run_blocks(base.model, x)[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_window_that_the_body_does_not_hold_is_not_run_in_parts(tmp_path):
    base = model_of(tmp_path / "m", "gemma3")
    assert by_blocks(base)
    # Of another size than its caches: nothing could be tested on short rows.
    find_body(base.model).window_size = 17
    assert not by_blocks(base) and not parts_are_exact(base.model)
    assert not parts_are_exact(base.model, [2])
    # No row is short enough to try a window of four.
    narrow = model_of(tmp_path / "narrow", "gemma3-narrow")
    assert not by_blocks(narrow)
    # Such a model merges by the next best method.
    examples = narrow.encode("a", rows())
    library = Library([], [Task("a", examples, examples, None)], Scorer(Engine(narrow)))
    assert method_of(library, MergeOptions()) == "regmean++"


# Prompts


@pytest.fixture
def thinker(tmp_path):
    """A template that opens a thought for the model, which finished conversations do not have."""
    path = tiny_model(tmp_path / "m", seed=9)
    tokenizer = tiny_tokenizer()
    asks = "<|im_start|>assistant\n' }}{% endif"
    assert asks in CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE.replace(asks, asks.replace("\n'", "\n<think>\n'"))
    tokenizer.save_pretrained(path)
    return Model(str(path))


@pytest.mark.parametrize("messages", [False, True])
def test_answers_and_routes_ask_with_the_whole_prompt(thinker, messages):
    row = {"prompt": "the fox", "completion": "Berlin is the answer to this question"}
    if messages:
        row = {"messages": [{"role": "user", "content": "the fox"},
                            {"role": "assistant", "content": row["completion"]}]}  # fmt: skip
    examples = thinker.encode("a", [row])
    (encoded,) = examples.examples
    served = thinker.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the fox"}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.prompt_tokens == tuple(served) != encoded.tokens[: encoded.offset]
    assert thinker.tokenizer.decode(encoded.prompt_tokens).endswith("assistant\n<think>\n")
    methods = {"base": BenchMethod(0, [{"a": None}])}
    (answer,) = answer_rows(thinker, methods, [([row], examples)])["a"]
    # Twice the expected length and 16, if no end comes before.
    tokens = greedy(thinker.model, thinker.tokenizer, served, 2 * encoded.n_targets + 16)
    assert len(tokens) == 2 * encoded.n_targets + 16
    assert answer["base"] == thinker.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    # Rows of plain text have no prompt.
    assert answer_rows(thinker, methods, [([{"text": "a fox"}], examples)]) == {"a": []}


# Fingerprints: the keys of what the caches keep


def test_what_is_kept_is_of_one_mlx_lm_and_one_mlx(tmp_path, monkeypatch):
    path = str(tiny_model(tmp_path / "m"))
    examples = Model(path).encode("a", rows())
    # A usual template needs no other prompt than that of the row.
    assert all(row.prompt is None and row.prompt_tokens for row in examples.examples)
    kept = {Engine(Model(path)).fingerprint(examples)}
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "version", lambda name: "99")
        kept.add(Engine(Model(path)).fingerprint(examples))
    monkeypatch.setattr(device, "_MLX", "99")
    assert len({*kept, Engine(Model(path)).fingerprint(examples)}) == 3
