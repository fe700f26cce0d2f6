"""Chat templates of strangers that meet what their trial had not: other messages."""

import time

import pytest
from helpers.tiny import tiny_tokenizer

from d2c_mlx.serve import text
from d2c_mlx.serve.requests import ChatRequest, RequestError

LOOP = "{% for _ in range(99999) %}"


@pytest.mark.parametrize(
    "template, problem",
    [
        (LOOP * 3 + "{% endfor %}" * 3, "TemplateTimeoutError: it takes more than 1 s"),
        ("{{ 10 ** (10 ** 8) }}", "OverflowError"),
        ("{{ 2 * 'x' * 10 ** 10 }}", "OverflowError"),
        ("{{ messages * 10 ** 9 }}", "OverflowError"),
        ("{{ 3 * 0.5 * 2 ** 10 * 1000000 * 4 ** -1 }}{{ 'ab' * 2 }}", None),
    ],
)
def test_rendering_a_prompt_ends(monkeypatch, template, problem):
    monkeypatch.setattr(text, "_SECONDS", 1.0)
    tokenizer, start = tiny_tokenizer(), time.monotonic()
    encoder = text.Encoder(tokenizer, None)
    tokenizer.chat_template = template
    request = ChatRequest.model_validate_json(
        '{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    )
    if problem is None:
        assert tokenizer.decode(encoder.encode(request)) == "384000000.0abab"
    else:
        with pytest.raises(RequestError, match=problem) as caught:
            encoder.encode(request)
        assert (caught.value.status, caught.value.field) == (400, "messages")
    # Nothing is thrown later, and the lock is free.
    tokenizer.chat_template = "x"
    assert encoder.encode(request)
    assert time.monotonic() - start < 10
