"""A pack as a repository: its card is parsed, its snippets are run, a hub on loopback takes it."""

import getpass
import json
import platform
import re
import shlex
import shutil

import pytest
from helpers.exported import adapter_of
from helpers.hub import TOKEN, Hub
from helpers.tiny import library
from huggingface_hub import ModelCard

from d2c_mlx.packs.export import export
from d2c_mlx.packs.overwrite import MARKER
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import push, read_bench, render_card
from d2c_mlx.packs.write import remove_tasks, write_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.serve.router import ROUTER
from d2c_mlx.utils.errors import ConfigError, InputError


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def contents(folder):
    """File -> bytes; the marker stays on this machine."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file() and p.name != MARKER}  # fmt: skip


def tables(text):
    """Rows of every Markdown table, cells stripped, without head and rule."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    heads = [i for i, row in enumerate(rows) if set("".join(row)) <= set("-:")]
    ends = [*(i - 1 for i in heads[1:]), len(rows)]
    return {tuple(rows[i - 1]): rows[i + 1 : end] for i, end in zip(heads, ends)}


KEPT = ("task", "adapter", "base", "own adapter", "here", "kept")


def test_the_folder_is_the_pack_and_plain_adapters(pack, tmp_path):
    push(pack, "org/name", output=tmp_path / "out")
    export(pack, "mlx", tmp_path / "mlx")
    found, plain_files = contents(tmp_path / "out"), contents(tmp_path / "mlx")
    assert plain_files.items() <= found.items()
    assert contents(pack.path).items() <= found.items()
    assert found.keys() == plain_files.keys() | contents(pack.path).keys() | {"README.md"}
    assert load_pack(tmp_path / "out").manifest == pack.manifest


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2", "60%"])
def test_the_card_of_a_run(tmp_path, budget):
    """Numbers are those of bench.json; nothing of this machine."""
    paths = library(tmp_path, ["a", "b", "c|d <b>"])
    options = {"adapters": str(paths.adapters), "tasks": str(paths.tasks)}
    session = run(RunConfig(**options, model=str(paths.model), budget=budget, probe_examples=2,
                       test_examples=2, output=str(tmp_path / "run")), quiet=True)  # fmt: skip
    found = load_pack(session.path("pack"))
    push(found, "org/name", "org/base", "mit", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "org/base" and card.data.library_name == "mlx"
    assert card.data.license == "mit" and {"lora", "mlx", "peft"} <= set(card.data.tags)
    shown = {name: name.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
             for name in session.library.names}  # fmt: skip
    methods = session.read("bench.json")["methods"]
    kept = {row[0]: row[1:] for row in tables(card.text)[KEPT]}
    assert kept.keys() == {*shown.values(), "mean"}
    for name in session.library.names:
        losses = [methods[m]["tasks"][name]["loss"] for m in ("base", "individual", "pack")]
        key = found.tasks[name]
        place = "the base model" if key is None else str(key) if budget == "2" else f"cluster-{key}"
        assert kept[shown[name]][:4] == [place, *(f"{loss:.4f}" for loss in losses)]
        retention = methods["pack"]["tasks"][name]["retention"]
        assert kept[shown[name]][4] == ("-" if retention is None else f"{100 * retention:.1f}%")
    for name, content in contents(tmp_path / "out").items():
        for secret in (str(tmp_path), platform.node(), f"/{getpass.getuser()}/"):
            assert secret.encode() not in content, name
    copy = load_pack(shutil.copytree(found.path, tmp_path / "other" / "copy"))
    assert read_bench(copy) is None and read_bench(found)["losses"].keys() == {*found.tasks, None}
    with pytest.raises(ConfigError, match="of another manifest.* move it away"):
        read_bench(remove_tasks(found, ["a"]))


def test_what_is_not_known_is_said(plain, copy_of):
    origins = {"one": "org/a@" + "0" * 40, "removed": "org/b@" + "1" * 40}
    pack = load_pack(copy_of(plain, origins=origins, merged={"cluster-0": 3}))
    card = ModelCard(render_card(pack, "org/name"))
    assert "Not measured." in card.text and KEPT not in tables(card.text)
    assert tables(card.text)["task", "adapter"] == [["one", "cluster-0"], ["two", "cluster-1"]]
    assert card.data.base_model == "tiny/llama" and card.data.license == "other"
    assert f"one: [org/a](https://huggingface.co/org/a) at commit `{'0' * 40}`" in card.text
    assert f"removed: [org/b](https://huggingface.co/org/b) at commit `{'1' * 40}`" in card.text
    assert "- two: from files of who pushed this" in card.text
    assert "which are in merges still and not named here: 1\n" in card.text
    assert "No licence was given" in card.text


HOSTILE = "<img src=x onerror=alert(1)>|`[a](javascript:b)` *b* $x$ '; id #"


def test_names_and_origins_are_text(about, tmp_path):
    """A model card says what strangers wrote, and does nothing of it."""
    origins = {HOSTILE: "org/a@main`\u202e</a>", "two": "org/a\n---\nlicense: mit"}
    facts = about.model_copy(update={"origins": origins})
    pack = write_pack(tmp_path / "pack", [adapter_of(HOSTILE), adapter_of("two")], facts)
    license = "x\n---\nbase_model: evil"
    text = render_card(pack, "org/name", license=license, revision="a`; id")
    card = ModelCard(text)
    assert card.data.license == license and card.data.base_model == "tiny/llama"
    # Code is shown as it is, so it may look like anything.
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


def test_what_does_not_fit_is_refused(plain, compact, copy_of, about, tmp_path):
    plain = load_pack(copy_of(plain))

    def refused(words, call):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert len(caught.value.problems) == 1
        assert not (tmp_path / "out").exists()

    def write(one=plain, repo="org/name", out=tmp_path / "out", **more):
        push(one, repo, output=out, **more)

    bench = plain.path.parent / "bench.json"
    for content in ("{", "[]", '{"methods": 3}', json.dumps({"methods": {}, "provenance": {}})):
        bench.write_text(content)
        refused("bench.json: ", lambda: read_bench(plain))
        refused("bench.json: ", write)
    bench.unlink()
    refused("repo: 'name', expected a Hugging Face id", lambda: write(repo="name"))
    refused("repo: 'org/name@v1', expected", lambda: write(repo="org/name@v1"))
    refused("base: 'a/b/c', expected a Hugging Face id", lambda: write(base="a/b/c"))
    local = write_pack(
        tmp_path / "local", [adapter_of("one")], about.model_copy(update={"model": "mine"})
    )
    refused("base: 'mine', expected a Hugging Face id", lambda: write(local))
    refused("would replace the pack", lambda: write(out=plain.path.parent))


@pytest.mark.slow
def test_a_push_and_what_the_card_says_of_it(hub, compact, model, tmp_path):
    """Over LFS and the commit endpoint; then every snippet of the card, as it stands."""
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
    lines = [
        "import json, sys, torch, numpy as np, mlx.core as mx, d2c_mlx",
        "from huggingface_hub.cli.hf import main as hf",
        "from d2c_mlx_cli.main import cli",
        f"sys.argv = ['hf', *{shlex.split(download)!r}]",
        "try: hf()",
        "except SystemExit as stop: assert not stop.code",
        f"cli({shlex.split(export)!r}, standalone_mode=False)",
        f"{mlx_lm}\nfirst = model",
        f"{ours}\npack.switch(model, 'also')\nsecond = model",
        f"{peft}\nthird = model.float()",
        "x = [[1, 2, 3]]",
        "a, b = (np.array(m(mx.array(x)).astype(mx.float32)) for m in (first, second))",
        "c = third(torch.tensor(x)).logits.detach().numpy()",
        "print(json.dumps([float(abs(a - b).max()), float(abs(a - c).max())]))",
    ]
    (tmp_path / "work").mkdir()
    more["PYTHONPATH"] = ""  # with torch
    ran = hub.run(tmp_path / "home", code="\n".join(lines), cwd=tmp_path / "work", **more)
    assert ran.returncode == 0, ran.stderr
    same, close = json.loads(ran.stdout.splitlines()[-1])
    assert same == 0 and close < 1e-2


@pytest.mark.slow
def test_a_push_replaces_the_last_one(hub, plain, compact, tmp_path):
    hub.repos["org/name"] = {
        "main": {"picture.png": b"mine", "cluster-7/adapters.safetensors": b"", ROUTER: b""}
    }
    for one in (compact, plain):
        done = hub.run(tmp_path / "home", "push", one.path, "org/name", HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        push(one, "org/name", output=tmp_path / "expected")
        expected = {**contents(tmp_path / "expected"), "picture.png": b"mine"}
        assert hub.files("org/name") == expected


@pytest.mark.slow
def test_what_the_hub_does_not_take_is_one_line(hub, plain, tmp_path):
    hub.repos["org/public"] = {"main": {}}
    hub.refused["other/name"] = (403, "", "You don't have the rights to create a model")
    token = {"HF_TOKEN": TOKEN}
    for repo, args, more, words in (
        ("org/name", [], {}, ["not logged in", "hf auth login", "--output DIR"]),
        ("other/name", [], token, ["403", "token that may write to other/name"]),
        ("org/public", ["--private"], token, ["is there and public", "nothing was sent"]),
    ):
        done = hub.run(tmp_path / "home", "push", plain.path, repo, *args, **more)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and all(word in line for word in words), line
    assert hub.repos == {"org/public": {"main": {}}}
