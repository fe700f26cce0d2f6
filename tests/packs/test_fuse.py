"""One task baked into the base: the weights, what stock mlx-lm loads, and what is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import pack_of
from helpers.loras import lora_of
from helpers.tiny import end_answers, tiny_model, write_jsonl
from mlx_lm import load
from mlx_lm.utils import quantize_model, save

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.fused import FusedModel, round_compensated
from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import load_stock, switch
from d2c_mlx.packs.fuse import check_fused, fuse_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.errors import InputError

TOKENS = mx.arange(1, 40)[None] * 7 % 250
LEAVES = ("weight", "scales", "biases")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base of widths that groups of 64 divide, two adapters, their pack, and prompts of one."""
    root = tmp_path_factory.mktemp("fuse")
    tiny_model(root / "model", hidden_size=64, intermediate_size=128)
    end_answers(root / "model")
    base, rng, adapters = Model(str(root / "model")), np.random.default_rng(1), []
    for name, ends in (("a", ("q_proj", "v_proj", "down_proj")), ("b", ("k_proj",))):
        loras = {path: lora_of(rng, shape, 4, 1.5, mx.float16, 0.4)
                 for path, shape in base.module_shapes.items() if path.endswith(ends)}  # fmt: skip
        adapters.append(Adapter(name, loras, None, (name,)))
        adapters[-1].save(root / "loras" / name, base.n_layers)
    pack_of(base, adapters, root / "pack", budget="2")
    pack_of(base, adapters[:1], root / "single", budget="1")
    for name, first in (("probe", 0), ("test", 50)):
        rows = [{"prompt": f"Question {i}: what is {i * i}?"} for i in range(first, first + 20)]
        write_jsonl(root / "tasks" / "a" / f"{name}.jsonl", rows)
    return root


def fuse(root, output, **options):
    given = {"task": "a", "bits": 16, "most": 0, "tasks": None, "model": str(root / "model")}
    return fuse_task(root / "pack", output, **given | options)


@pytest.mark.parametrize("dtype, close", [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_16_bits_are_base_and_adapter(root, tmp_path, dtype, close):
    """Every weight is W + scale * (A B).T, and stock mlx-lm computes the same from it."""
    base = tiny_model(tmp_path / "base", dtype, hidden_size=64, intermediate_size=128)
    # Links of a stranger's base to files outside of it are not copied, nor is its code.
    (tmp_path / "secret").write_text('{"password": 1}')
    for name in ("evil.py", "generation_config.json"):
        (base / name).symlink_to(tmp_path / "secret")
    result = fuse(root, tmp_path / "fused", model=str(base))
    assert not [x for x in (tmp_path / "fused").iterdir() if "password" in x.read_text("latin-1")]
    before, after = (mx.load(str(x / "model.safetensors")) for x in (base, tmp_path / "fused"))
    adapter = load_pack(root / "pack").load("a")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        ours, expected = (np.array(x.astype(mx.float32)) for x in (after[name], weight))
        if lora := adapter.modules.get(name.removesuffix(".weight")):
            a, b = (np.array(x.astype(mx.float32)) for x in (lora.a, lora.b))
            expected = expected + lora.scale * (a @ b).T
        assert after[name].dtype == dtype
        np.testing.assert_allclose(ours, expected, close, close)
    fused, tokenizer = load(str(tmp_path / "fused"))
    beside, _ = load_stock(base)
    switch(beside, adapter, root)
    for model in (fused, beside):
        model.set_dtype(mx.float32)
    logits, expected = (np.array(model(TOKENS)) for model in (fused, beside))
    assert np.abs(logits - expected).max() < 3 * close * np.abs(expected).max()
    assert tokenizer.chat_template and result["how"] == "16 bit" and not result["losses"]
    assert result["present"]["share"] == pytest.approx(1, abs=close)


@pytest.mark.parametrize("group, bits", [(64, 4), (32, 3)])
def test_a_base_in_the_same_bits_keeps_what_has_no_update(root, tmp_path, group, bits):
    """The rest as it is, to the bit; modules with an update as stock mlx_lm.fuse rounds them."""
    base, source = tmp_path / "base", str(root / "model")
    model, tokenizer, config = load(source, return_config=True)
    save(base, source, model, tokenizer, quantize_model(model, config, group, bits)[1])
    fuse(root, tmp_path / "fused", bits=bits, model=str(base))
    before, after = (mx.load(str(x / "model.safetensors")) for x in (base, tmp_path / "fused"))
    adapter = load_pack(root / "pack").load("a")
    for path in ("model.embed_tokens", *Model(str(base)).module_shapes):
        stored = [before[f"{path}.{leaf}"] for leaf in LEAVES]
        if lora := adapter.modules.get(path):
            whole = mx.dequantize(*stored, group, bits)
            whole += mx.array(lora.delta()).astype(whole.dtype)
            stored = mx.quantize(whole, group, bits)
        for leaf, x in zip(LEAVES, stored):
            assert mx.array_equal(after[f"{path}.{leaf}"], x), (path, leaf)
    form = load(str(tmp_path / "fused"), return_config=True)[2]["quantization"]
    assert (form["group_size"], form["bits"]) == (group, bits)
    fuse(root, tmp_path / "whole", model=str(base))
    whole = mx.load(str(tmp_path / "whole" / "model.safetensors"))
    stored = [before[f"model.embed_tokens.{leaf}"] for leaf in LEAVES]
    assert mx.array_equal(whole["model.embed_tokens.weight"], mx.dequantize(*stored, group, bits))
    assert "quantization" not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_errors_are_compensated_on_inputs_of_few_directions():
    """Stored numbers are those of mlx, and outputs are closer than of rounding to nearest."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, 128)).astype(np.float32)
    x = (rng.normal(size=(300, 20)) @ rng.normal(size=(20, 128))).astype(np.float32)
    gram = x.T @ x + 1e-2 * np.trace(x.T @ x) / 128 * np.eye(128)
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T.astype(np.float32)
    for bits in (2, 3, 4, 8):
        form = {"group_size": 64, "bits": bits}
        *packed, lost = round_compensated(weight, factor, form, mx.float16)
        nearest = mx.quantize(mx.array(weight).astype(mx.float16), 64, bits)
        ours, theirs = (np.array(mx.dequantize(*parts, 64, bits).astype(mx.float32))
                        for parts in (packed, nearest))  # fmt: skip
        errors = [np.square(x @ (rounded - weight).T).sum() for rounded in (ours, theirs)]
        assert errors[0] < 0.4 * errors[1]
        if bits < 8:  # where rounding to 16 bit is not of its size
            expected = ((ours - weight) @ gram * (ours - weight)).sum()
            assert lost == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tasks. left out 1 of 40 prompts")
def test_what_is_lost_is_measured_and_made_up_for(root, tmp_path):
    """On the adapter's own answers: at 2 bits each step keeps more, and the best is written."""
    result = fuse(root, tmp_path / "small", bits=2, tasks=root / "tasks")
    steps = ["base", "adapter", "to nearest", "error compensation"]
    assert list(result["kept"]) == list(result["losses"]) == steps
    assert result["losses"]["adapter"] < result["losses"]["base"]
    room = result["nbytes"] + 30_000
    wide = fuse(root, tmp_path / "wide", bits=2, tasks=root / "tasks", most=room)
    assert list(wide["kept"]) == [*steps, "8 bits for some"] and wide["how"] == "8 bits for some"
    assert wide["kept"][wide["how"]] > result["kept"][result["how"]]
    assert wide["nbytes"] == (tmp_path / "wide" / "model.safetensors").stat().st_size <= room
    form = json.loads((tmp_path / "wide" / "config.json").read_text())["quantization"]
    assert form["bits"] == 2 and form["model.embed_tokens"]["bits"] == 8
    assert list(fuse(root, tmp_path / "8", bits=8, tasks=root / "tasks")["kept"]) == steps[:3]


def test_whether_a_model_contains_an_adapter(root, tmp_path, command):
    fuse(root, tmp_path / "fused", bits=4)
    for model in (tmp_path / "fused", root / "model"):
        for name in ("a", "b"):
            expected = int((model.name, name) == ("fused", "a"))
            argv = ("--base", root / "model", "--adapter", root / "loras" / name, "--json")
            code, out, _ = command("fuse", "--check", model, *argv)
            present, verdict = json.loads(out), ("lacks", "contains")[expected]
            assert (
                code == 1 - expected and f"{model.name} {verdict} {name}: " in present["sentence"]
            )
            for share in (present["share"], *present["modules"].values()):
                assert share == pytest.approx(expected, abs=0.05)
    # Rounding is far larger than this update.
    faint = load_pack(root / "pack").load("a")
    faint = replace(faint, modules={k: replace(m, scale=1e-3) for k, m in faint.modules.items()})
    present = check_fused(str(tmp_path / "fused"), faint, str(root / "model"))
    assert "is too noisy" in present["sentence"]
    weights = mx.load(str(root / "model" / "model.safetensors"))
    weights["model.layers.0.self_attn.q_proj.weight"] *= np.nan
    mx.save_safetensors(str(tmp_path / "fused" / "model.safetensors"), weights)
    (tmp_path / "fused" / "config.json").write_bytes((root / "model" / "config.json").read_bytes())
    with pytest.raises(InputError, match="are not finite"):
        check_fused(str(tmp_path / "fused"), faint, str(root / "model"))


BAD = [
    ({}, "no --task was named; it serves a, b"),
    ({"task": "c"}, "no task 'c'; it serves a, b"),
    ({"task": "a", "bits": "7"}, "'7' is not one of"),
    ({"task": "a", "tasks": "none"}, "probe.jsonl: missing"),
    ({"task": "a", "max-bytes": 9000, "bits": 4}, "max_bytes: found 9,000, 4 bits take"),
    ({"task": "a", "output": None}, "give PACK and --output, or --check and --adapter"),
    ({"task": "a", "check": "fused"}, "give PACK and --output, or --check and --adapter"),
    ({"task": "a", "output": "pack"}, "output: this command writes"),
    ({"task": "a", "model": "other"}, "no linear layer"),
]


@pytest.mark.parametrize("options, words", BAD)
def test_what_cannot_be_fused_is_refused_in_a_line(root, monkeypatch, command, options, words):
    monkeypatch.chdir(root)
    tiny_model(root / "other", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    before = sorted(root.rglob("*"))
    given = {"model": "model", "output": "out", **options}
    argv = [part for name, x in given.items() if x is not None for part in (f"--{name}", x)]
    code, out, err = command("fuse", "pack", *argv)
    assert (code, out, err.count("error: ")) == (2, "", 1) and words in err
    assert sorted(root.rglob("*")) == before


def test_adapters_of_embeddings_are_refused(root):
    whole = load_pack(root / "pack").load("a")
    for path, shape in (("lm_head", (64, 300)), ("model.embed_tokens", (300, 64))):
        lora = lora_of(np.random.default_rng(0), shape, 2, 1.0, mx.float16, 0.1)
        with pytest.raises(InputError, match=f"first: {path}.*embeddings, lm_head"):
            FusedModel(root / "model", replace(whole, modules={path: lora}), 4)


def test_the_only_task_needs_no_name(root, tmp_path, command):
    argv = ("--model", root / "model", "--output", tmp_path / "fused")
    code, out, _ = command("fuse", root / "single", *argv)
    assert code == 0 and "not measured: give --tasks" in out
