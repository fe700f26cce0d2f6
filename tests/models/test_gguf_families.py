"""GGUF bases of all families and types: transformers on the same file, torch with its values.

The tables in docs/reference/families.md are what this test finds; `D2C_MLX_WRITE_DOCS=1 pytest
tests/models/test_gguf_families.py` writes them.
"""

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from helpers.bases import COLUMNS, through_all
from helpers.gguf_bases import BASES, TEXTS, TOKENS, blocks
from helpers.made_by_tests import check_table, run_with_torch, table
from mlx_lm import load as stock_load

from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.gguf_file import float_rows, open_gguf, packed_rows

pytestmark = pytest.mark.slow

PACKED = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}
UNPACKED = ("F32", "F16", "BF16", "Q2_K", "Q3_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
            "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4")  # fmt: skip
found: dict = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("bases")
    run_with_torch("gguf_bases.py", path)
    return path


@pytest.mark.parametrize("family", BASES)
def test_logits_and_tokens_are_those_of_transformers(root, family):
    *_, pre, read = BASES[family]
    known = np.load(root / family / "known.npz")
    base = Model(str(root / family / "model.gguf"))
    y = np.array(base.model(mx.array(TOKENS)))
    others = ("torch", "transformers") if read else ("torch",)
    for one in others:
        assert np.abs(known[one]).max() > 1
        assert np.abs(y - known[one]).max() < 1e-4
    # Files in the cache are those of any mlx-lm model; it is as exact there.
    stock, _ = stock_load(str(base.path))
    stock.set_dtype(mx.float32)
    assert np.abs(np.array(stock(mx.array(TOKENS))) - known["torch"]).max() < 1e-3
    for i, text in enumerate(TEXTS):
        if f"text {i}" in known:
            assert base.tokenizer.encode(text) == known[f"text {i}"].tolist()
    if pre == "refact":
        encode = base.tokenizer.encode
        assert encode("20") == [*encode("2"), *encode("0")]
    found[family] = others


# The first family of every architecture, by general.architecture.
CHAIN = {BASES[family][2]: family for family in reversed(BASES)}


@pytest.mark.parametrize("family", CHAIN.values())
def test_a_base_in_gguf_goes_through_the_whole_program(root, family, tmp_path):
    found[family, "run"] = through_all(root / family / "model.gguf", tmp_path)


@pytest.mark.parametrize("kind", [*PACKED, *UNPACKED])
def test_values_of_a_type_are_those_of_the_gguf_package(kind, tmp_path):
    rng = np.random.default_rng(0)
    data = blocks(kind, (6, 512), rng)
    raw = GGMLQuantizationType[kind]
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x.weight", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = open_gguf(tmp_path / "x.gguf").tensors
    expected = dequantize(data, raw)
    assert np.abs(expected).max() > 0.01
    packed = packed_rows(tensor, tensor.data)
    if kind in PACKED:
        words, scales, biases = map(mx.array, packed)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(words, scales, biases, group_size=32, bits=PACKED[kind])
    else:
        assert packed is None
        values = float_rows(tensor, tensor.data)
    np.testing.assert_allclose(np.array(values), expected, rtol=1e-6, atol=1e-6)
    found[kind] = f"packed, {PACKED[kind]} bits" if kind in PACKED else "float32"


def test_a_template_alone_beside_the_file_is_used(root, tmp_path):
    (tmp_path / "model.gguf").symlink_to(root / "Qwen2" / "model.gguf")
    (tmp_path / "chat_template.jinja").write_text("NEW")
    base = Model(str(tmp_path / "model.gguf"))
    assert base.tokenizer.chat_template == "NEW"
    known = np.load(root / "Qwen2" / "known.npz")
    assert base.tokenizer.encode(TEXTS[0]) == known["text 0"].tolist()


def test_what_cannot_be_read_is_named_in_one_line(root, tmp_path):
    data = (root / "Qwen2" / "model.gguf").read_bytes()
    last = max(open_gguf(root / "Qwen2" / "model.gguf").tensors, key=lambda one: one.data_offset)
    name, family, path = b"blk.1.ffn_up.weight", b"\x05\0\0\0\0\0\0\0qwen2", tmp_path / "x.gguf"
    at = data.index(name) + len(name) + 4 + 16
    for content, words in (
        (data[: last.data_offset + 64], ["truncated"]),
        (data[:at] + (99).to_bytes(4, "little") + data[at + 4 :], ["99", "update it"]),
        (data.replace(family, family.replace(b"qwen2", b"rwkv7"), 1),
         ["general.architecture is 'rwkv7', expected one of gemma2"]),
        (data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.wodel"),
         ["tokenizer None", "put the model's tokenizer.json and tokenizer_config.json beside"]),
    ):  # fmt: skip
        path.write_bytes(content)
        caught = pytest.raises(ModelError, Model, str(path))
        (line,) = caught.value.problems
        assert "\n" not in line and str(path) in line
        assert all(word in line for word in words), line


def test_table_in_the_docs():
    if set(found) != {*BASES, *((one, "run") for one in CHAIN.values()), *PACKED, *UNPACKED}:
        pytest.skip("not every cell was run, or one has failed")
    rows = []
    for one, (_, _, architecture, *_) in BASES.items():
        first = CHAIN[architecture]
        cells = found[one, "run"] if one == first else (f"as {first}", *("" for _ in COLUMNS[1:]))
        rows.append([one, " and ".join(found[one]), *cells])
    types = [[kind, found[kind]] for kind in (*PACKED, *UNPACKED)]
    check_table(
        "tests/models/test_gguf_families.py",
        table(["family", "load, logits agree with", *COLUMNS], *rows)
        + "\n" + table(["type", "kept as"], *types),
    )  # fmt: skip
