"""Model families x features of PEFT adapters: torch PEFT, stock mlx-lm and ours, and back.

The table in docs/reference/families.md is what this test finds; `D2C_MLX_WRITE_DOCS=1 pytest
tests/models/test_families.py` writes it.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.families import FAMILIES, FEATURES, TOKENS
from helpers.gguf_files import permuted, read_gguf
from helpers.made_by_tests import check_table, run_with_torch, table
from helpers.tiny import ALL, peft_adapter, tiny_tokenizer
from mlx_lm import load as stock_load
from safetensors.numpy import load_file

from d2c_mlx import export, read_adapter, save_peft
from d2c_mlx.adapters.checks import DoraBase
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.layerwise import check_blocks, merge_layerwise
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import method_of
from d2c_mlx.merge.methods import MergeOptions
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model, block_index
from d2c_mlx.models.tasks import Task
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import AdapterError

pytestmark = pytest.mark.slow

CONVERTER = ROOT / "benchmarks" / "results" / "gguf_families.json"
CELLS = [(family, feature) for family in FAMILIES for feature in FEATURES]
cells: dict = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    run_with_torch("families.py", path)
    for family in FAMILIES:
        tiny_tokenizer().save_pretrained(path / family / "model")
    return path


@pytest.fixture(scope="module")
def bases(root):
    """Family -> its model, loaded once."""
    return {family: Model(str(root / family / "model")) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_merges_every_family(root, bases, family):
    base = bases[family]
    rows = ExampleSet("a", tuple(Example(tuple(TOKENS[0, i:].tolist()), 3) for i in (0, 5)))
    library = Library([], [Task("a", rows, rows, None)], Scorer(Engine(base)))
    assert method_of(library, MergeOptions()) == "layerwise"
    check_blocks(base)
    adapter = read_adapter(root / family / "all linear", base.module_shapes)
    same = merge_layerwise(base, [adapter, adapter], [rows, rows])
    assert same.modules.keys() == adapter.modules.keys()
    for path, lora in adapter.modules.items():
        size = np.abs(lora.delta()).max()
        assert np.abs(same.modules[path].delta() - lora.delta()).max() < 1e-3 * size


def logits(model):
    return np.array(model(mx.array(TOKENS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_the_one_that_torch_has(root, bases, family):
    bases[family].attach(None)
    expected = np.load(root / family / "logits.npz")["base"]
    assert np.abs(logits(bases[family].model) - expected).max() < 1e-4


def check_dora(base, source, right):
    """A LoRA of full rank is the DoRA, on this base; one of a smaller rank loses what it says."""
    whole, less = (
        read_adapter(source, base.module_shapes, dora=DoraBase(base.weight, rank))
        for rank in (1000, 8)
    )
    assert whole.dora_error < 1e-5 < less.dora_error < 1
    base.attach(whole)
    assert np.abs(logits(base.model) - right["DoRA"]).max() < 1e-5 * np.abs(right["DoRA"]).max()
    assert np.abs(right["base"] - right["DoRA"]).max() > 1e-2
    deltas = [(lora.delta(), less.modules[path].delta()) for path, lora in whole.modules.items()]
    lost = np.concatenate([np.ravel(x - y) for x, y in deltas])
    total = np.concatenate([x.ravel() for x, _ in deltas])
    error = np.linalg.norm(lost) / np.linalg.norm(total)
    assert less.dora_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("family, feature", CELLS)
def test_cell(root, bases, family, feature, tmp_path):
    base, source, words = bases[family], root / family / feature, FEATURES[feature][1]
    if words:
        with pytest.raises(AdapterError, match=words) as caught:
            read_adapter(source, base.module_shapes)
        cells[family, feature] = "refused"
        if feature == "DoRA":
            assert len(caught.value.problems) == 1
            check_dora(base, source, np.load(root / family / "logits.npz"))
            cells[family, feature] = "--accept-dora"
        return
    right = np.load(root / family / "logits.npz")
    adapter = read_adapter(source, base.module_shapes)
    base.attach(adapter)
    assert np.abs(logits(base.model) - right[feature]).max() < 1e-4
    assert np.abs(right["base"] - right[feature]).max() > 1e-2
    adapter.save(tmp_path / "mlx", base.n_layers)
    stock, _ = stock_load(str(base.path), adapter_path=str(tmp_path / "mlx"))
    assert np.abs(logits(stock) - right[feature]).max() < 1e-4
    # Back to PEFT: every factor bit by bit, or the same dW where the layout has one rank.
    save_peft(adapter, tmp_path / "peft")
    name = "adapter_model.safetensors"
    before, after = load_file(source / name), load_file(tmp_path / "peft" / name)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    again = read_adapter(tmp_path / "peft", base.module_shapes)
    assert again.digest == adapter.digest
    stored = read_adapter(tmp_path / "mlx")
    for path, lora in adapter.modules.items():
        np.testing.assert_allclose(stored.modules[path].delta(), lora.delta(), rtol=1e-5, atol=1e-6)
    cells[family, feature] = "exact"


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_has_the_names_and_rows_that_llama_cpp_s_converter_gives(
    root, bases, family, tmp_path
):
    """What benchmarks/formats/gguf_families.py found in the output of convert_lora_to_gguf.py."""
    known = json.loads(CONVERTER.read_text())["rows"][family]
    base = bases[family]
    config = json.loads((base.path / "config.json").read_text())
    adapter = read_adapter(root / family / "all linear", base.module_shapes)
    save_gguf(adapter, tmp_path / "x.gguf", config)
    _, deltas = read_gguf(tmp_path / "x.gguf")
    assert {name.split(".")[2] for name in deltas} == set(known["tensors"])
    assert len(deltas) == len(adapter.modules)
    assert known["moved"] in ([], ["attn_k", "attn_q"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    expected = []
    for path, lora in adapter.modules.items():
        n = heads.get(path.rpartition(".")[2]) if known["moved"] else None
        rows = permuted(lora.delta(), n) if n else lora.delta()
        expected.append((f"blk.{block_index(path)}.", rows))
    for name, delta in deltas.items():
        same = [rows.shape == delta.shape and np.allclose(rows, delta, rtol=1e-5, atol=1e-6)
                for block, rows in expected if name.startswith(block)]  # fmt: skip
        assert sum(same) == 1, name
    # And back, names and rows as the base has them.
    again = read_adapter(tmp_path / "x.gguf", base.module_shapes, config)
    assert again.digest == adapter.uniform().digest


def test_a_vision_language_model_is_its_text_model(root):
    tiny_tokenizer().save_pretrained(root / "vision" / "model")
    base = Model(str(root / "vision" / "model"))
    with np.load(root / "vision" / "logits.npz") as file:
        known = dict(file)
    assert np.abs(logits(base.model) - known["base"]).max() < 1e-4
    base.attach(read_adapter(root / "vision" / "text", base.module_shapes))
    assert np.abs(logits(base.model) - known["text"]).max() < 1e-4
    assert np.abs(known["base"] - known["text"]).max() > 1e-2
    assert base.dimensions == (64, 300)
    with pytest.raises(AdapterError, match=r"modules are no .*first: model\.(multi|vision)"):
        read_adapter(root / "vision" / "all", base.module_shapes)


def test_weights_that_mlx_lm_multiplies_take_no_lora_from_outside(tmp_path):
    """Those of a Falcon-H1, whose adapters are read and written in mlx-lm's layout alone."""
    config, llama = {"model_type": "falcon_h1"}, {"model_type": "llama"}
    peft_adapter(tmp_path, "peft", targets=("self_attn.o_proj",))
    adapter = read_adapter(tmp_path / "peft", ALL)
    adapter.save(tmp_path / "mlx", 2)
    (tmp_path / "gguf").mkdir()
    qwen = {"model_type": "qwen2", "num_hidden_layers": 2}
    save_gguf(adapter, tmp_path / "gguf" / "x.gguf", qwen)
    named = replace(adapter, base="tiiuae/Falcon-H1-0.5B-Instruct", sources=("a",))
    about = Manifest(model="Falcon-H1-0.5B", config_hash="", n_layers=2, budget="-")
    pack, out = write_pack(tmp_path / "pack", [named], about), tmp_path / "out"
    read_adapter(tmp_path / "mlx", ALL, config)
    for use in (
        *(lambda source=source: read_adapter(tmp_path / source, ALL, config)
          for source in ("peft", "gguf/x.gguf", "gguf")),
        lambda: save_peft(adapter, out, config), lambda: save_peft(named, out, None),
        lambda: export(pack, "peft", out),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=r"[Ff]alcon[_-][Hh]1.*: mlx-lm folds") as caught:
            use()
        assert len(caught.value.problems) == 1 and not out.exists()
    # Of another base the name alone says nothing.
    save_peft(named, out, llama)


def test_table_in_the_docs(bases):
    if set(cells) != set(CELLS):
        pytest.skip("not every cell was run, or one has failed")
    rows, modules = [["family", *FEATURES]], {}
    for family, base in bases.items():
        names = ", ".join(sorted({path.rpartition(".")[2] for path in base.module_shapes}))
        modules.setdefault(names, []).append(family)
        rows.append([family, *(cells[family, feature] for feature in FEATURES)])
    lists = "".join(f"- {', '.join(some)}: {names}\n" for names, some in modules.items())
    check_table("tests/models/test_families.py",
                f"{table(*rows)}\nModules of a block:\n\n{lists}")  # fmt: skip
