"""What the documents say is run, and every module says what it exports."""

import ast
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import mlx.core as mx
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers import ROOT
from helpers.loras import lora_of
from helpers.losses import greedy
from helpers.tiny import LAYERS, task, tiny_model

import d2c_mlx
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.resolve import config_digest
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.run.config import load_config

WALKED = list(pkgutil.walk_packages(d2c_mlx.__path__, "d2c_mlx."))
MODULES = [one.name for one in WALKED if not one.ispkg]
WINGS = [one.name for one in WALKED if one.ispkg]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.mark.slow
def test_python_examples_run(monkeypatch, tmp_path, capsys):
    """The Python blocks of the tutorial, on the embedded model; only its output goes elsewhere."""
    run, use = blocks("docs/tutorial/python.md", "python")
    # As the page says for a CPU device.
    in_float32 = use.replace("\nchat = ", "\nmodel.set_dtype(mx.float32)\nchat = ")
    names: dict = {"mx": mx}
    monkeypatch.chdir(ROOT)
    assert all(len([x for x in code.splitlines() if x.strip()]) <= 8 for code in (run, use))
    for code in (run, in_float32):
        exec(code.replace("runs/readme", str(tmp_path / "run")), names)
    lines = capsys.readouterr().out.strip().splitlines()
    assert 0 < float(lines[1]) < 5
    (said,) = re.findall(r"  # (.*)", next(x for x in use.splitlines() if "generate(" in x))
    assert lines[2:] == [said]
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


PAGES = [
    path for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md",
                    "tests/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
    links += [(path, "") for path in re.findall(r'\bsrc(?:set)?="([^"]+)"', text)]
    for target, anchor in links:
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}"


def pack_of(directory, stored, others=()):
    """A pack at runs/first beside its base; returns adapters of the names, packed or not."""
    model, rng = tiny_model(directory / "base"), np.random.default_rng(0)
    path = "model.layers.1.self_attn.q_proj"
    adapters = {n: Adapter(n, {path: lora_of(rng, (32, 32), 2, dtype=mx.float16)}, "tiny", (n,))
                for n in (*stored, *others)}  # fmt: skip
    about = Manifest(model="tiny", config_hash=config_digest(model), n_layers=LAYERS,
                     budget=str(len(stored)))  # fmt: skip
    write_pack(directory / "runs" / "first" / "pack", [adapters[n] for n in stored], about)
    return adapters


@pytest.mark.slow
def test_a_pack_lives_as_the_docs_say(monkeypatch, tmp_path):
    """Commands of docs/how-to/change-a-pack.md, in order; the last state is verified."""
    from d2c_mlx.packs.pack import load_pack

    adapters = pack_of(tmp_path, ["num-de"], ["gec-nl", "qa-nl"])
    for name in ("gec-nl", "qa-nl"):
        adapters[name].save(tmp_path / "loras" / name, LAYERS)
    task(tmp_path / "tasks", "qa-nl")
    monkeypatch.chdir(tmp_path)
    commands, routes = blocks("docs/how-to/change-a-pack.md", "sh")
    for line in [*commands.strip().splitlines(), "d2c-mlx verify runs/first/pack"]:
        result = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "runs" / "first" / "pack" / "manifest.json").read_text())
    assert manifest["tasks"] == {"num-de": "cluster-0", "qa-nl": "cluster-0"}
    assert manifest["merged"] == {"cluster-0": 3}
    task(tmp_path / "tasks", "num-de")
    for line in routes.strip().splitlines():
        args = shlex.split(line, comments=True)[1:]
        result = CliRunner().invoke(cli, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
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

    pack_of(tmp_path, ["num-de", "num-es"])
    monkeypatch.chdir(tmp_path)
    commands, planned = blocks("docs/how-to/other-programs.md", "sh")
    assert planned.startswith("d2c-mlx run ")  # on adapters and rows: tests/compress/test_gguf.py
    for line in commands.strip().splitlines():
        name, *args = shlex.split(line, comments=True)
        assert name == "d2c-mlx"
        result = CliRunner().invoke(cli, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
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
    path, rng = "model.layers.1.self_attn.q_proj", np.random.default_rng(0)
    for name in ("num-de", "num-es"):
        lora = lora_of(rng, (32, 32), 2, dtype=mx.float16)
        Adapter(name, {path: lora}, "tiny", (name,)).save(tmp_path / "loras" / name, LAYERS)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/how-to/no-rows.md", "python")
    exec(code, {"shapes": {path: (32, 32)}})
    merged = d2c_mlx.read_adapter(tmp_path / "merged", {path: (32, 32)})
    assert merged.modules[path].rank == 2


@pytest.mark.slow
def test_serving_as_the_docs_say(tmp_path, capsys):
    """The Python block of docs/how-to/serve.md, on real weights, against the base model offline."""
    from dataclasses import replace
    from threading import Thread

    from d2c_mlx.adapters.reading import read_adapter
    from d2c_mlx.models.model import Model
    from d2c_mlx.packs.manifest import Manifest
    from d2c_mlx.packs.write import write_pack
    from d2c_mlx.serve.service import PackService
    from d2c_mlx.web.server import PackServer

    base = Model()
    adapters = [
        replace(read_adapter(ROOT / "examples/demo/adapters" / n, base.module_shapes), sources=(n,))
        for n in ("num-de", "num-es")
    ]
    pack = write_pack(
        tmp_path / "run" / "pack",
        adapters,
        Manifest(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers, budget="2"),
    )
    tokenizer = base.tokenizer
    messages = [{"role": "user", "content": "Write 896 in German words:"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    base.attach(adapters[0])
    expected = tokenizer.decode(
        greedy(base.model, base.tokenizer, prompt, 64), skip_special_tokens=True
    )
    (code,) = blocks("docs/how-to/serve.md", "python")
    service = PackService(pack, Model())
    server = PackServer(("127.0.0.1", 0), service)
    thread = Thread(target=server.run)
    thread.start()
    try:
        exec(code.replace("http://127.0.0.1:8080/v1", server.url), {})
    finally:
        server.stop()
        thread.join()
    assert "hundert" in expected and capsys.readouterr().out.strip() == expected.strip()


def test_demo_config_is_valid():
    config = load_config(ROOT / "examples" / "demo.yaml", {"output": "x"})
    names = {path.name for path in (ROOT / config.adapters).iterdir()}
    assert 6 <= len(names) <= 8
    assert names == {path.name for path in (ROOT / config.tasks).iterdir()}
    size = sum(f.stat().st_size for f in (ROOT / "examples").rglob("*")
               if f.is_file() and ".build" not in f.parts)  # fmt: skip
    assert size < 16e6


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    names = [key for key, value in vars(module).items()
             if key[0] != "_" and getattr(value, "__module__", None) == name]  # fmt: skip
    for value in (getattr(module, public) for public in names):
        # A type in other words, like Callable[[int], int], cannot have any.
        assert value.__doc__ is not None or not callable(value) or get_origin(value)


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_is_introduced_and_imports_nothing(name):
    """So that a command's help loads no more than it needs."""
    source = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    (docstring,) = ast.parse(source).body
    assert isinstance(docstring.value, ast.Constant) and docstring.value.value.strip()


def test_workflow_and_ci_call_the_readme_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert {"run": ".ci/run"} in steps["jobs"]["test"]["steps"]
    first = blocks("README.md", "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.slow
def test_commands_that_tests_start_have_no_torch_like_a_user_s():
    """Only by an import can one tell: the pipeline, the CLI, and the base model's classes."""
    code = (
        "import d2c_mlx.pipeline, d2c_mlx_cli.main, importlib.util, mlx_lm\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "try:\n    import torch\nexcept ModuleNotFoundError:\n    print('none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "none\n"), done.stderr
