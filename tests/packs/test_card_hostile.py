"""A model card says what strangers wrote, and does nothing of it."""

import json
import re

import pytest
from helpers.exported import adapter_of
from huggingface_hub import ModelCard

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import CardOptions, render_card
from d2c_mlx.packs.write import write_pack

NAME = "<img src=x onerror=alert(1)>|`[a](javascript:b)` *b* $x$ '; id #"


@pytest.fixture
def pack(tmp_path, about):
    pack = write_pack(tmp_path / "pack", [adapter_of(NAME), adapter_of("two")], about)
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest["origins"] = {NAME: "org/a@main`\u202e</a>", "two": "org/a\n---\nlicense: mit"}
    (pack.path / "manifest.json").write_text(json.dumps(manifest))
    return load_pack(pack.path)


def test_names_and_origins_are_text(pack):
    options = CardOptions(license="x\n---\nbase_model: evil", revision="a`; id")
    text = render_card(pack, "org/name", options)
    card = ModelCard(text)
    assert card.data.license == options.license and card.data.base_model == "tiny/llama"
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
