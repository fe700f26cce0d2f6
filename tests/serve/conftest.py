"""A tiny pack, its model with an adapter per row, and what stock mlx-lm answers."""

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.adapters import ABOUT, ADAPTERS
from helpers.served import NAMES
from helpers.tiny import (
    CHAT_TEMPLATE,
    LAYERS,
    library,
    task,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from mlx_lm import load as stock_load

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.attach import switch
from d2c_mlx.models.base_model import BaseModel, greedy
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_compact_pack, write_pack
from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.router import fit_router, save_router


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module", params=["plain", "compact"])
def pack(request, model_path, tmp_path_factory):
    """Three adapters of other ranks and modules; the compact one leaves a task to the base."""
    root = tmp_path_factory.mktemp("pack")
    base = BaseModel(str(model_path))
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash}
    if request.param == "plain":
        pack = write_pack(root / "pack", ADAPTERS, PackInfo(**about))
    else:
        levels = [{p: ((2, 4), (1, 2)) for p in one.modules} for one in ADAPTERS]
        stored = [compress(a, some, 32) for a, some in zip(ADAPTERS, levels)]
        serves = {name: i for i, name in enumerate(NAMES)} | {"bare": None}
        pack = write_compact_pack(root / "pack", stored, serves, PackInfo(**about))
    for name in pack.tasks:
        task(root / "tasks", name)
    probes = [base.encode(n, load_task(root / "tasks" / n).probe) for n in pack.tasks]
    return save_router(pack, fit_router(base.model, probes))


@pytest.fixture(scope="module")
def mixed(pack, model_path):
    return Adapters(BaseModel(str(model_path)), pack)


@pytest.fixture(scope="module")
def answer(pack, model_path):
    """`answer(task or adapter, prompt, n)`: greedy tokens of stock mlx-lm with its LoRA layers."""
    model, tokenizer = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    known = {}

    def ask(name, prompt, n):
        one = pack.load(name) if isinstance(name, str) else name
        key = one and one.digest, tuple(prompt), n
        if key not in known:
            switch(model, one and one.uniform(mx.float32), pack.path)
            known[key] = greedy(model, tokenizer, prompt, n)
        return known[key]

    ask.tokenizer = tokenizer
    return ask


@pytest.fixture
def spoken(tmp_path):
    """As SmolLM2's template: a system message of its own, rows have an empty one."""
    paths = library(tmp_path, list("ab"))
    tokenizer = tiny_tokenizer()
    default = "<|im_start|>system\nThe other foxes are watching the lazy dog.<|im_end|>\n"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '" + default.replace("\n", "\\n") + "' }}"
        "{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(paths.model)
    for name, words in (("a", "Write the number"), ("b", "Who is it? Answer")):
        rows = [
            {"messages": [{"role": role, "content": said} for role, said in
                          (("system", ""), ("user", f"{words} {i}"), ("assistant", "x"))]}
            for i in range(8)
        ]  # fmt: skip
        write_jsonl(paths.tasks / name / "probe.jsonl", rows[:4])
        write_jsonl(paths.tasks / name / "test.jsonl", rows[4:])
    base = BaseModel(str(paths.model))
    found = [replace(read_adapter(paths.adapters / n, base.module_shapes), sources=(n,))
             for n in "ab"]  # fmt: skip
    about = {"model": base.name, "config_hash": base.config_hash, "n_layers": LAYERS}
    return paths, write_pack(tmp_path / "run" / "pack", found, PackInfo(**about, budget="3"))
