"""Fixtures for tests of a pack at work."""

from dataclasses import replace

import pytest
from helpers.served import answer, mixed, model_path, pack
from helpers.tiny import CHAT_TEMPLATE, LAYERS, library, tiny_tokenizer, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_pack

__all__ = ["answer", "mixed", "model_path", "pack", "spoken"]


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
