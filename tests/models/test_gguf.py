"""GGUF -> mlx-lm directory: against the model it was made from, and the embedded default."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.gguf_files import write_gguf
from helpers.processes import no_room
from helpers.tiny import tiny_model

from d2c_mlx.models.gguf_import import config_of, convert_gguf
from d2c_mlx.models.model import Model
from d2c_mlx.models.resolve import resolve_model
from d2c_mlx.utils.errors import ModelError


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    tiny_model(tmp_path / "source")
    beside = tmp_path / "gguf"
    beside.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tmp_path / "source" / name).exists():
            (beside / name).write_bytes((tmp_path / "source" / name).read_bytes())
    return tmp_path / "source"


MANY = {f"blk.{i}.ffn_down.{j}": mx.ones(1) for i in range(513) for j in range(6)}
MANY["blk.512.ffn_down.weight"] = mx.ones(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "mamba"}, ["general.architecture", "mamba", "llama"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope.scaling.type", "'none' or 'linear'"]),
        ({"llama.block_count": mx.array(1 << 30, mx.uint32)}, ["1073741824 blocks in"]),
        # Before a model or a tokenizer is built.
        ({"llama.block_count": mx.array(3, mx.uint32)}, ["3 blocks in 20 tensors"]),
        ({"tensors": {"token_embd.weight": mx.ones((1, 1))}}, ["token_embd.weight is [1, 1]"]),
        ({"tokenizer.ggml.tokens": ["a" * 513] * 256}, ["256 tokens of up to 513 characters"]),
        ({"tokenizer.ggml.tokens": ["a" * 512] * 257}, ["67,371,008 in their splits"]),
        ({"llama.block_count": mx.array(513, mx.uint32), "tensors": MANY}, ["513 blocks in 3099"]),
        ({"tensors": {"rope_freqs.weight": mx.arange(1.0, 5)}}, ["rope_freqs.weight"]),
        ({"tensors": {"blk.0.attn_q.bias": mx.ones(4)}}, ["blk.0.attn_q.bias"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(source, tmp_path, changes, words):
    path = write_gguf(source, tmp_path / "gguf" / "bad.gguf", mx.float32, **changes)
    caught = pytest.raises(ModelError, Model, str(path))
    assert all(word in str(caught.value) for word in words)
    assert not list((tmp_path / "cache" / "models").glob("*bad*"))


@pytest.mark.parametrize("family", ["gemma2", "lfm2"])
def test_a_scaled_rope_that_mlx_lm_would_pass_over_is_refused(family):
    numbers = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count",
               "attention.layer_norm_rms_epsilon", "context_length", "attention.sliding_window",
               "shortconv.l_cache")  # fmt: skip
    fields = dict.fromkeys(numbers, 8)
    fields |= {"attention.head_count_kv": [8], "rope.scaling.type": "linear"}
    fields = {f"{family}.{name}": value for name, value in fields.items()}
    fields |= {"general.architecture": family, "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(ModelError, match="rope.scaling.type is 'linear', expected 'none'"):
        config_of(fields, True, "float16", None, Path("x.gguf"))


def test_a_tokenizer_that_changes_beside_the_file_is_converted_anew(source, tmp_path):
    path = write_gguf(source, tmp_path / "gguf" / "tiny.gguf", mx.float32)
    before = resolve_model(str(path))[1]
    assert resolve_model(str(path))[1] == before
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (before / name).exists() == (source / name).exists()
    first = Model(str(path)).tokenizer.chat_template
    assert first == Model(str(source)).tokenizer.chat_template
    (path.parent / "chat_template.jinja").write_text("NEW")
    assert resolve_model(str(path))[1] != before
    assert Model(str(path)).tokenizer.chat_template == "NEW" != first


def test_a_suffix_in_capitals_and_a_folder_without_a_name(source, tmp_path, monkeypatch):
    path = tmp_path / "gguf" / "X.GGUF"
    # MLX would write X.GGUF.gguf.
    write_gguf(source, tmp_path / "gguf" / "x.gguf", mx.float32).rename(path)
    name, directory = resolve_model(str(path))
    assert name == "X" and (directory / "model.safetensors").is_file()
    pytest.raises(ModelError, resolve_model, "none.GGUF").match("no such file")
    (source / "inside").mkdir()
    for place, spec in ((source, "."), (source / "inside", "..")):
        monkeypatch.chdir(place)
        assert resolve_model(spec)[0] == "source"


# A file of weights has about 140 kB, those of the tokenizer are smaller.
@pytest.mark.parametrize("nbytes", [1_000, 60_000])
@pytest.mark.parametrize("inside", [False, True])
def test_a_full_disk_is_no_broken_model(source, tmp_path, nbytes, inside):
    """Files are copied, written by Python and MLX, and by a tokenizer written in Rust."""
    if inside:
        shutil.rmtree(tmp_path / "gguf")
        (tmp_path / "gguf").mkdir()
    changes = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["1 2", "3 4"]}
    path = write_gguf(source, tmp_path / "gguf" / "tiny.gguf", mx.float32, **changes)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="File too large"), no_room(nbytes):
        convert_gguf(path, out)
    convert_gguf(path, out)
    assert (out / "model.safetensors").stat().st_size > 60_000
    assert 1_000 < (out / "tokenizer.json").stat().st_size < 60_000


@pytest.mark.parametrize("merges", ["", "12", "1 2 3", "1 of", "1 " + "2" * 300_000])
def test_merges_that_the_tokenizers_package_refuses_are_one_line(source, tmp_path, merges):
    shutil.rmtree(tmp_path / "gguf")
    (tmp_path / "gguf").mkdir()  # no tokenizer.json beside the file
    changes = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["1 2", "1 2", merges]}
    path = write_gguf(source, tmp_path / "gguf" / "tiny.gguf", mx.float32, **changes)
    caught = pytest.raises(ModelError, Model, str(path))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.slow
def test_embedded_default_stays_packed_and_speaks_english(base):
    """4-bit weights are kept as they are; the tokenizer splits digits and knows its specials."""
    config = json.loads((base.path / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    assert base.dtype == mx.float16
    assert base.tokenizer.encode("2026") == base.tokenizer.convert_tokens_to_ids(list("2026"))
    assert base.tokenizer.eos_token == "<|im_end|>"
    prompt = base.tokenizer.encode("The capital of France is")
    base.attach(None)
    best = mx.argmax(base.model(mx.array([prompt]))[0, -1]).item()
    assert base.tokenizer.decode([best]).strip() == "Paris"
