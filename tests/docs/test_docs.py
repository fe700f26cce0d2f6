"""Commands and code in the documents are run as they are written."""

import json
import re
import shlex

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.adapters import adapter_of, pack_of
from helpers.command import typed
from helpers.losses import greedy
from helpers.served import serving
from helpers.tiny import LAYERS, task, tiny_model

import d2c_mlx
from d2c_mlx.models.model import Model
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.run.config import load_config
from d2c_mlx.serve.scheduler import Limits

DEMO = "examples/demo/adapters"
Q = "model.layers.1.self_attn.q_proj"


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def type_all(lines):
    """Commands as a page shows them."""
    for line in lines.strip().splitlines():
        name, *words = shlex.split(line, comments=True)
        assert name == "d2c-mlx"
        typed(*words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:budget. 3 has room for all adapters")
def test_python_examples_run(monkeypatch, tmp_path, capsys):
    """The Python blocks of the tutorial, on the embedded model.

    Only its output goes elsewhere, and three of its adapters do, not merged.
    """
    run, use = blocks("docs/tutorial/python.md", "python")
    assert all(len([x for x in code.splitlines() if x.strip()]) <= 8 for code in (run, use))
    few = ",".join(f"{DEMO}/{name}" for name in ("date-en", "num-de", "num-es"))
    # As the page says for a CPU device.
    use = use.replace("\nchat = ", "\nmodel.set_dtype(mx.float32)\nchat = ")
    names: dict = {"mx": mx}
    monkeypatch.chdir(ROOT)
    run = run.replace('"budget": "2"', '"budget": "3"').replace('examples": 2', 'examples": 1')
    for code in (run.replace(f'"{DEMO}"', f'"{few}"'), use):
        exec(code.replace("runs/readme", str(tmp_path / "run")), names)
    lines = capsys.readouterr().out.strip().splitlines()
    assert 0 < float(lines[1]) < 5
    (answer,) = re.findall(r"  # (.*)", next(x for x in use.splitlines() if "generate(" in x))
    assert lines[2:] == [answer]
    # What was switched to last serves: the logits of its adapter on a fresh model.
    fresh, _ = d2c_mlx.load(tmp_path / "run" / "pack", "num-es")
    fresh.set_dtype(mx.float32)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(names["model"](tokens), fresh(tokens))


def anchors(path):
    """What GitHub calls a page's headings: without marks and punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("folder", [".", "docs", "benchmarks", "examples", "tests"])
def test_links_lead_somewhere(folder):
    for page in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md")):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
        links += [(path, "") for path in re.findall(r'\bsrc(?:set)?="([^"]+)"', text)]
        for target, anchor in links:
            if "://" in target:
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page}: {target}"
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), f"{page}: {target}#{anchor}"


def adapters_of(*names):
    return [adapter_of(name, [Q], 2, 10.0, seed) for seed, name in enumerate(names)]


def pack_at(directory, adapters):
    """A pack at runs/first beside its base."""
    base = Model(str(tiny_model(directory / "base")))
    path = directory / "runs" / "first" / "pack"
    return pack_of(base, adapters, path, model="tiny", budget=str(len(adapters)))


@pytest.mark.slow
def test_a_pack_lives_as_the_docs_say(monkeypatch, tmp_path):
    """Commands of docs/how-to/change-a-pack.md, in order; the last state is verified."""
    first, *others = adapters_of("num-de", "gec-nl", "qa-nl")
    pack_at(tmp_path, [first])
    for adapter in others:
        adapter.save(tmp_path / "loras" / adapter.name, LAYERS)
    task(tmp_path / "tasks", "qa-nl")
    monkeypatch.chdir(tmp_path)
    commands, routes = blocks("docs/how-to/change-a-pack.md", "sh")
    type_all(f"{commands}d2c-mlx verify runs/first/pack")
    manifest = json.loads((tmp_path / "runs" / "first" / "pack" / "manifest.json").read_text())
    assert manifest["tasks"] == {"num-de": "cluster-0", "qa-nl": "cluster-0"}
    assert manifest["merged"] == {"cluster-0": 3}
    task(tmp_path / "tasks", "num-de")
    type_all(routes)
    pack = load_pack(tmp_path / "runs" / "first" / "pack")
    model, tokenizer = d2c_mlx.load(pack, model="base")
    chat = [{"role": "user", "content": "Question 1 of the user: what is qa-nl?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    names = {"pack": pack, "model": model, "prompt": prompt}
    (code,) = blocks("docs/how-to/change-a-pack.md", "python")
    exec(code, names)
    assert names["match"] is None or names["match"].task in pack.tasks


@pytest.mark.slow
def test_using_a_pack_as_the_docs_say(monkeypatch, tmp_path, capsys):
    """Commands and Python of other-programs.md, in order, beside a tiny model and its pack."""
    pack_at(tmp_path, adapters_of("num-de", "num-es"))
    monkeypatch.chdir(tmp_path)
    commands, planned = blocks("docs/how-to/other-programs.md", "sh")
    assert planned.startswith("d2c-mlx run ")  # on adapters and rows
    type_all(commands)
    names: dict = {}
    mlx_lm, switch, peft = blocks("docs/how-to/other-programs.md", "python")
    exec(mlx_lm + switch, names)
    assert capsys.readouterr().out.strip()
    tokens = [[1, 2, 3]]
    bare = names["model"](mx.array(tokens))
    names["pack"].switch(names["model"], "num-de")
    ours = np.array(names["model"](mx.array(tokens)).astype(mx.float32))
    assert np.abs(ours - np.array(bare.astype(mx.float32))).max() > 0.1
    exec(peft, names)
    theirs = names["model"].float()(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, ours, atol=2e-2)  # float16 on our side


def test_merging_without_rows_as_the_docs_say(monkeypatch, tmp_path):
    for adapter in adapters_of("num-de", "num-es"):
        adapter.save(tmp_path / "loras" / adapter.name, LAYERS)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/how-to/no-rows.md", "python")
    exec(code, {"shapes": {Q: (32, 32)}})
    assert d2c_mlx.read_adapter(tmp_path / "merged", {Q: (32, 32)}).modules[Q].rank == 2


def test_serving_as_the_docs_say(tmp_path, capsys):
    """The Python block of docs/how-to/serve.md, against the base model offline."""
    (adapter,) = adapters_of("num-de")
    pack = pack_at(tmp_path, [adapter])
    base = Model(str(tmp_path / "base"))
    messages = [{"role": "user", "content": "Write 896 in German words:"}]
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    base.attach(pack.load("num-de"))
    tokens = greedy(base.model, base.tokenizer, prompt, 64)
    expected = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    (code,) = blocks("docs/how-to/serve.md", "python")
    limits = Limits(max_tokens=64)
    with serving(pack, tmp_path / "base", limits=limits) as server:
        exec(code.replace("http://127.0.0.1:8080/v1", server.url), {})
    assert expected and capsys.readouterr().out.strip() == expected


def test_the_demo_is_whole():
    config = load_config(ROOT / "examples" / "demo.yaml", {"output": "x"})
    names = {path.name for path in (ROOT / config.adapters).iterdir()}
    assert 6 <= len(names) <= 8
    assert names == {path.name for path in (ROOT / config.tasks).iterdir()}
