"""The context of models whose config has it among those of the text."""

import json

import mlx.core as mx
import pytest
from helpers.tiny import tiny_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3, llama, llama4

from d2c_mlx.models.examples import context_length
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import TaskError

TEXT = {
    "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
LONG = "the fox " * 60


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Gemma 3 as it is published, the text's config inside that of text and images."""
    directory = tmp_path_factory.mktemp("context") / "model"
    directory.mkdir()
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    config = {"model_type": "gemma3", "vocab_size": 300, "text_config": TEXT,
              "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = gemma3.Model(gemma3.ModelArgs.from_dict(json.loads(json.dumps(config))))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def test_of_mlx_lms_own_arguments():
    assert context_length(gemma3.ModelArgs("gemma3", dict(TEXT), 300)) == 64
    text = {"max_position_embeddings": 64, "model_type": "llama4_text"}
    fields = dict.fromkeys(llama4.TextArgs.__dataclass_fields__, 1)
    nested = llama4.ModelArgs.from_dict({"model_type": "llama4", "text_config": fields | text})
    assert not isinstance(nested.text_config, dict) and context_length(nested) == 64
    plain = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
             "intermediate_size": 8, "num_attention_heads": 1, "rms_norm_eps": 1e-5}  # fmt: skip
    assert context_length(llama.ModelArgs(**plain, max_position_embeddings=512)) == 512
    assert context_length(llama.ModelArgs(**plain)) is None
    for odd in ({}, {"text_config": None}, {"text_config": "x"}, {"max_position_embeddings": "x"}):
        assert context_length(odd) is None


def test_rows_beyond_it_are_refused(path):
    row = {"prompt": LONG, "completion": "x"}
    with pytest.raises(TaskError, match="more than the model's context of 64"):
        Model(str(path)).encode("t", [row])
