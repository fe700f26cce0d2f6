"""Chat templates and tokenizers of strangers that would run for ever, or end the process."""

import json

import pytest
from helpers.tiny import tiny_model

from d2c_mlx.models import trial
from d2c_mlx.models.resolve import resolve_model
from d2c_mlx.utils.errors import ModelError

LOOP = "{% for _ in range(99999) %}"
BAD = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "several": [{"name": "default", "template": LOOP * 3 + "{% endfor %}" * 3}],
    "doubling": LOOP + "{% set x.y = x.y ~ x.y %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "long": LOOP + "0123456789abcdef{% endfor %}",
    "growing": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 6,
    "panic": [{"type": "Replace", "pattern": {"String": ""}, "content": "x" * 8}],
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_model_whose_texts_do_not_end_is_refused(model, monkeypatch, kind):
    monkeypatch.setattr(trial, "_SECONDS", 1)
    if isinstance(BAD[kind], str):
        start = "{% set x = namespace(y='ab') %}"
        (model / "chat_template.jinja").write_text(start + BAD[kind])
    elif kind == "several":
        (model / "chat_template.jinja").unlink()
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": BAD[kind]}))
    else:
        file = model / "tokenizer.json"
        content = json.loads(file.read_text())
        content["normalizer"] = {"type": "Sequence", "normalizers": BAD[kind]}
        file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"^{model}: .* for a short conversation, or ends its"):
        resolve_model(str(model))


def test_a_model_is_tried_once_until_its_texts_change(model, monkeypatch):
    tried = []
    monkeypatch.setattr("d2c_mlx.models.resolve.try_texts", lambda path: tried.append(path) or "x")
    for _ in range(2):
        resolve_model(str(model))
    # An error in words is told where the file is used.
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    resolve_model(str(model))
    assert tried == [model] * 2
    monkeypatch.undo()
    assert trial.try_texts(model) == "good"
