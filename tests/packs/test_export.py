"""Exports and pushes, each read back by another reader than the one that wrote it."""

import getpass
import json
import platform
import re
import shlex
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.adapters import adapter_of
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.hub import TOKEN, Hub
from helpers.tiny import ALL, edit_json, tiny_model
from huggingface_hub import ModelCard
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2c_mlx import Adapter, export, load_pack, read_adapter, verify
from d2c_mlx.models.resolve import config_digest
from d2c_mlx.packs.overwrite import MARKER
from d2c_mlx.packs.push import push, render_card
from d2c_mlx.packs.write import write_pack
from d2c_mlx.serve.router import ROUTER
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import hash_file, hash_tree


def test_gguf_holds_the_adapters_of_the_pack(pack, model, tmp_path):
    tasks = export(pack, "gguf", tmp_path / "out", str(model))
    assert tasks == json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert list(tasks) == sorted(pack.tasks)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {MARKER, "tasks.json", "cluster-0.gguf", "cluster-1.gguf"}
    for task, name in tasks.items():
        adapter = pack.load(task)
        assert (adapter is None) == (name is None)
        if adapter is None:
            continue
        if pack.storage == "gguf":
            written = hash_file(tmp_path / "out" / name)
            assert written == hash_file(pack.path / pack.tasks[task])
        metadata, deltas = read_gguf(tmp_path / "out" / name)
        keys = ("general.type", "adapter.type", "general.architecture")
        assert [metadata[key] for key in keys] == ["adapter", "lora", "llama"]
        assert deltas.keys() == {gguf_name(path) for path in adapter.modules}
        for path, lora in adapter.modules.items():
            expected = in_llama_rows(path, lora.delta())
            # A compact pack rounds to float16 what a GGUF leaves to the reader.
            np.testing.assert_allclose(deltas[gguf_name(path)], expected, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_exported(plain, about, model, tmp_path):
    """A model that is given is the pack's own, also where nothing of it is needed."""
    other, out = tiny_model(tmp_path / "other", rope_theta=20000.0), tmp_path / "out"
    edit_json(other / "config.json", model_type="gemma3")
    changed = {"config_hash": config_digest(other)}
    gemma = replace(plain, manifest=plain.manifest.model_copy(update=changed))
    lora, odd = adapter_of("one").modules[[*ALL][0]], "model.layers.0.self_attn.qkv_proj"
    fused = write_pack(tmp_path / "odd", [Adapter("x", {odd: lora}, sources=("x",))], about)
    checked = partial(verify, plain.path, "vllm-metal")
    for call, base, words in (
        (partial(export, plain, "onnx", out), model, "'onnx', expected one of mlx, mlx-swift, "),
        (partial(export, gemma, "gguf", out), other, "model_type is 'gemma3'.* one of gemma2, "),
        (partial(export, fused, "gguf", out), model, f"no name in a GGUF of 'llama' .first: {odd}"),
        (partial(export, plain, "gguf", out), None, "the pack is for 'tiny/llama'"),
        *((partial(export, plain, to, out), other, "is not the config") for to in ("mlx", "peft")),
        (checked, other, "is not the config"),
        (checked, tmp_path / "none", "/none' is no directory"),
    ):
        pytest.raises(InputError, call, model=base and str(base)).match(words)
        assert not out.exists()
    checked(model=str(model))


def test_mlx_swift_has_own_ranks_and_the_logits_that_mlx_lm_has(pack, model, tmp_path):
    """MLX replaces parameters of any shape, in Swift as in Python; only mlx-lm looks at shapes."""
    tasks = export(pack, "mlx", tmp_path / "mlx")
    assert export(pack, "mlx-swift", tmp_path / "swift") == tasks
    tokens = mx.arange(1, 25)[None] * 7 % 250
    for name in sorted({name for name in tasks.values() if name}):
        padded, own = tmp_path / "mlx" / name, tmp_path / "swift" / name
        config = json.loads((own / "adapter_config.json").read_text())
        assert config == json.loads((padded / "adapter_config.json").read_text())
        expected, _ = stock_load(str(model), adapter_path=str(padded))
        stock, _ = stock_load(str(model))
        linear_to_lora_layers(stock, config["num_layers"], config["lora_parameters"])
        weights = mx.load(str(own / "adapters.safetensors"))
        stock.load_weights(list(weights.items()), strict=False)
        stock.eval()
        assert mx.abs(stock(tokens) - expected(tokens)).max().item() < 1e-5
        if name == "cluster-1" and pack.storage == "compact":
            ranks = {x.shape[0]: "v_proj" in key for key, x in weights.items() if key[-1] == "b"}
            assert ranks == {1: False, 2: True}
            assert hash_tree(own) != hash_tree(padded)


def test_peft_has_the_same_bits_and_in_torch_the_logits_that_mlx_lm_has(pack, model, tmp_path):
    export(pack, "mlx", tmp_path / "mlx")
    tasks = export(pack, "peft", tmp_path / "peft")
    adapters = {name: pack.load(task) for task, name in tasks.items()}
    tokens = np.arange(1, 25)[None] * 7 % 250
    torch_base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        bare = torch_base(torch.tensor(tokens)).logits.numpy()
        for name in sorted(filter(None, adapters)):
            again = read_adapter(tmp_path / "peft" / name, ALL)
            assert (again.digest, again.base) == (adapters[name].digest, "tiny/llama")
            peft = PeftModel.from_pretrained(torch_base, tmp_path / "peft" / name).eval()
            theirs = peft(torch.tensor(tokens)).logits.numpy()
            torch_base = peft.unload()
            stock, _ = stock_load(str(model), adapter_path=str(tmp_path / "mlx" / name))
            assert np.abs(np.array(stock(mx.array(tokens))) - theirs).max() < 1e-4
            assert np.abs(bare - theirs).max() > 1e-2


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def contents(folder):
    """File -> bytes; the marker stays on this machine."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_folder_is_the_pack_and_plain_adapters(pack, tmp_path):
    push(pack, "org/name", output=tmp_path / "out")
    export(pack, "mlx", tmp_path / "mlx")
    pushed = contents(tmp_path / "out")
    assert pushed.pop("README.md")
    assert pushed == contents(tmp_path / "mlx") | contents(pack.path)
    assert load_pack(tmp_path / "out").manifest == pack.manifest


def test_the_card_says_what_was_measured_and_what_is_not_known(plain, copy_of, tmp_path):
    """Numbers are those of the bench.json beside the pack; nothing of this machine is sent."""
    origins = {"one": "org/a@" + "0" * 40, "removed": "org/b@" + "1" * 40}
    pack = load_pack(copy_of(plain, origins=origins, merged={"cluster-0": 3}))
    bench = pack.path.parent / "bench.json"

    def card(**options):
        push(pack, "org/name", output=tmp_path / "out", **options)
        for name, content in contents(tmp_path / "out").items():
            for secret in (str(tmp_path), platform.node(), f"/{getpass.getuser()}/"):
                assert secret.encode() not in content, name
        return ModelCard((tmp_path / "out" / "README.md").read_text())

    def measure(manifest):
        methods = {}
        for i, name in enumerate(("base", "individual", "pack")):
            tasks = {"one": {"loss": i, "kept": 0.25}, "two": {"loss": i, "kept": None}}
            methods[name] = {"loss": 3.0 - i, "kept": 1 - i / 8, "tasks": tasks}
        about = {"pack": {"manifest_sha256": hash_file(manifest)}, "compute_dtype": "float32"}
        rows = {task: [[0.5, 1]] * 7 for task in pack.tasks}
        bench.write_text(json.dumps({"methods": methods, "provenance": about, "rows": rows}))

    measure(pack.path / "manifest.json")
    measured = card(base="org/base", license="mit")
    assert (measured.data.base_model, measured.data.license) == ("org/base", "mit")
    for line in (
        "(7 per task at most)",
        "| one | cluster-0 | 0.0000 | 1.0000 | 2.0000 | 25.0% |",
        "| two | cluster-1 | 0.0000 | 1.0000 | 2.0000 | - |",
        "| mean |  | 3.0000 | 2.0000 | 1.0000 | 75.0% |",
    ):
        assert line in measured.text
    measure(plain.path / "cluster-0" / "adapter_config.json")
    pytest.raises(ConfigError, card).match("of another manifest.* move it away")
    bench.unlink()
    bare = card()
    assert (bare.data.base_model, bare.data.license) == ("tiny/llama", "other")
    for words in (
        "Not measured.", "| one | cluster-0 |\n| two | cluster-1 |", "No licence was given",
        f"one: [org/a](https://huggingface.co/org/a) at commit `{'0' * 40}`", "removed: [org/b]",
        "- two: from files of who pushed this", "in merges still and not named here: 1\n",
    ):  # fmt: skip
        assert words in bare.text


HOSTILE = "<img src=x onerror=alert(1)>|`[a](javascript:b)` *b* $x$ '; id #"


def test_names_and_origins_are_text(about, tmp_path):
    origins = {HOSTILE: "org/a@main`\u202e</a>", "two": "org/a\n---\nlicense: mit"}
    facts = about.model_copy(update={"origins": origins})
    pack = write_pack(tmp_path / "pack", [adapter_of(HOSTILE), adapter_of("two")], facts)
    license = "x\n---\nbase_model: evil"
    text = render_card(pack, "org/name", license=license, revision="a`; id")
    card = ModelCard(text)
    assert card.data.license == license and card.data.base_model == "tiny/llama"
    # Code may look like anything.
    prose = re.sub(r"(?s)^```.*?^```", "", card.text, flags=re.MULTILINE)
    prose = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "<img" not in prose and "](javascript" not in prose.replace(r"\](", "")
    assert "$x$" not in prose and not re.search(r"(?<!\\)\*b", prose)
    assert "\u202e" not in text and "evil" not in str(card.data.base_model)
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4}
    (command,) = re.findall(r"^llama-cli .*$", card.text, re.MULTILINE)
    assert command.split("--lora ")[1].startswith(("'gguf/", "gguf/"))
    for line in re.findall(r"^(?:model, tokenizer|model) = .*$", card.text, re.MULTILINE):
        compile(line, "card", "exec")


def test_what_does_not_fit_is_refused(plain, copy_of, tmp_path):
    pack, out = load_pack(copy_of(plain)), tmp_path / "out"
    bench = pack.path.parent / "bench.json"
    for content in ("{", "[]", '{"methods": 3}', json.dumps({"methods": {}, "provenance": {}})):
        bench.write_text(content)
        pytest.raises(InputError, push, pack, "org/name", output=out).match("bench.json: ")
    bench.unlink()
    for options, field in (
        ({"repo": "org/name@v1"}, "repo: 'org/name@v1'"),
        ({"base": "a/b/c"}, "base: 'a/b/c'"),
        ({"output": pack.path.parent}, "would replace the pack"),
    ):
        with pytest.raises(InputError, match=field):
            push(pack, **{"repo": "org/name", "output": out, **options})
    assert not out.exists()


@pytest.mark.slow
def test_a_push_and_what_the_card_says_of_it(hub, compact, model, tmp_path):
    """And every snippet of its card, as it stands."""
    more = {"HF_TOKEN": TOKEN}
    options = ["--private", "--revision", "v1"]
    done = hub.run(tmp_path / "home", "push", compact.path, "org/name", *options, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed: {hub.url}/org/name/commit/{hub.commit('org/name', 'v1')}\n"
    push(compact, "org/name", revision="v1", output=tmp_path / "expected")
    assert hub.repos["org/name"]["v1"] == contents(tmp_path / "expected")
    assert hub.repos["org/name"]["main"] == {} and hub.private == {"org/name"}
    assert len([path for _, path in hub.log if "/commit/" in path]) == 1
    hub.repos["tiny/llama"] = {"main": {p.name: p.read_bytes() for p in model.iterdir()}}
    card = hub.files("org/name", "v1")["README.md"].decode()
    mlx_lm, ours, peft = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (download,) = re.findall(r"`hf (download .*?)`", card)
    (export,) = re.findall(r"`d2c-mlx (export .*? --to peft .*?)`", card)
    code = f"""
import json, sys, torch, numpy as np, mlx.core as mx, d2c_mlx
from huggingface_hub.cli.hf import main as hf
from d2c_mlx_cli.main import cli
sys.argv = ['hf', *{shlex.split(download)!r}]
try: hf()
except SystemExit as stop: assert not stop.code
cli({shlex.split(export)!r}, standalone_mode=False)
{mlx_lm}
first = model
{ours}
pack.switch(model, 'also')
a, b = (np.array(m(mx.array([[1, 2, 3]])).astype(mx.float32)) for m in (first, model))
{peft}
c = model.float()(torch.tensor([[1, 2, 3]])).logits.detach().numpy()
print(json.dumps([float(abs(a - b).max()), float(abs(a - c).max())]))
"""
    (tmp_path / "work").mkdir()
    more["PYTHONPATH"] = ""  # with torch
    ran = hub.run(tmp_path / "home", code=code, cwd=tmp_path / "work", **more)
    assert ran.returncode == 0, ran.stderr
    same, close = json.loads(ran.stdout.splitlines()[-1])
    assert same == 0 and close < 1e-2


@pytest.mark.slow
def test_a_push_replaces_the_last_one_or_is_refused_in_one_line(hub, plain, tmp_path):
    old = ("cluster-7/adapters.safetensors", "compact.safetensors", ROUTER)
    there = {"picture.png": b"mine", **dict.fromkeys(old, b"")}
    hub.repos["org/name"] = {"main": there}
    hub.refused["other/name"] = (403, "", "You don't have the rights to create a model")
    for words, token, problem in (
        ("org/name --private", TOKEN, ["is there and public", "nothing was sent"]),
        ("org/new", None, ["not logged in", "hf auth login", "--output DIR"]),
        ("other/name", TOKEN, ["403", "token that may write to other/name"]),
        ("org/name", TOKEN, []),
    ):
        done = hub.run(tmp_path, "push", plain.path, *words.split(), HF_TOKEN=token)
        assert done.returncode == bool(problem), done.stderr
        assert all(word in done.stderr for word in problem)
        assert not problem or (
            done.stderr.count("\n") == 1 and hub.repos["org/name"]["main"] is there
        )
    assert [*hub.repos] == ["org/name"]
    push(plain, "org/name", output=tmp_path / "expected")
    expected = {**contents(tmp_path / "expected"), "picture.png": b"mine"}
    assert hub.files("org/name") == expected
