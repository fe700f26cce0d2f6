"""What chat front ends ask beyond plain answers, and what those who watch a server read."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import mlx.core as mx
import numpy as np
from helpers.served import GOOD, client, get, idle, post, raw, serving, text
from mlx_lm import load as stock_load
from pydantic import BaseModel
from scipy.special import log_softmax

WARM = {"model": "wide", "prompt": "the fox", "max_tokens": 8, "temperature": 5.0}


class Fox(BaseModel):
    """A schema whose answers all end."""

    mood: Literal["lazy", "quick"]
    brown: bool


def test_a_seed_is_the_requests_own(server):
    """Whatever else is in the batch."""
    with client(server) as api, ThreadPoolExecutor(6) as pool:

        def ask(**options):
            return api.completions.create(**WARM | options).choices[0].text

        alone = ask(seed=3)
        others = [pool.submit(ask, seed=i, top_p=0.9, extra_body={"top_k": 40}) for i in range(4)]
        again = [pool.submit(ask, seed=3) for _ in range(4)]
        assert [reply.result() for reply in again] == [alone] * 4
        assert len({reply.result() for reply in others}) > 1
        assert ask(seed=5, extra_body={"top_k": 1}) == ask(seed=6, top_p=1e-6)


def test_the_likeliest_tokens_are_told(server, model_path):
    """Beside the whole model's own logits; what a grammar forbids is not among them."""
    model, tokenizer = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    expected = log_softmax(np.array(model(mx.array([tokenizer.encode("the fox")]))[0, -1]))
    order = np.argsort(-expected)[:5]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": Fox.model_json_schema()}}
    with client(server) as api:

        def ask(n, top, **more):
            more |= {"logprobs": True, "top_logprobs": top}
            reply = api.completions.create(model="model", prompt="the fox", max_tokens=n,
                                           extra_body=more)  # fmt: skip
            return reply.choices[0].logprobs.content

        first, _ = ask(2, 5)
        top = first["top_logprobs"]
        assert [token["id"] for token in top] == order.tolist() and first["id"] == order[0]
        np.testing.assert_allclose([x["logprob"] for x in top], expected[order], atol=1e-4)
        assert first["token"] == tokenizer.decode([order[0]])
        # JSON has no word for the log-probability of a token that is forbidden.
        tops = [token["top_logprobs"] for token in ask(8, 20, response_format=form)]
        assert all(other["logprob"] is not None for top in tops for other in top)
        assert all(tops) and any(len(top) < 20 for top in tops)


def test_an_answer_keeps_to_a_schema_and_its_neighbours_do_not(server, answer):
    """`parse` of OpenAI's client asks for it, strictly; a model of noise obeys."""
    chat = {"model": "wide", "messages": [{"role": "user", "content": "How is the fox?"}],
            "max_tokens": 60}  # fmt: skip
    with client(server) as api, ThreadPoolExecutor(8) as pool:

        def parse(seed):
            options = chat | {"temperature": 2.0, "seed": seed, "response_format": Fox}
            return api.chat.completions.parse(**options).choices[0].message.parsed

        plain = [pool.submit(lambda: api.completions.create(**GOOD)) for _ in range(3)]
        foxes = [*pool.map(parse, range(8))]
        assert all(isinstance(fox, Fox) for fox in foxes)
        assert len({(fox.mood, fox.brown) for fox in foxes}) > 1
        expected = text(answer, "wide", "the fox", 4)
        assert all(reply.result().choices[0].text == expected for reply in plain)
        # As the program `llm` sends it, in a stream.
        about = {"name": "output", "schema": Fox.model_json_schema()}
        form = {"type": "json_schema", "json_schema": about}
        events = api.chat.completions.create(**chat, stream=True, response_format=form)
        words = "".join(event.choices[0].delta.content or "" for event in events)
        assert Fox.model_validate_json(words)
        free = api.chat.completions.create(**chat, response_format={"type": "json_object"})
        assert free.choices[0].message.content.startswith("{")


FUNCTION = {"name": "f", "description": "The fox.",
            "parameters": {"type": "object", "properties": {}}}  # fmt: skip
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
MESSAGES = [{"role": "system", "content": "The lazy dog."}, {"role": "user", "content": "Who?"}]
# A tool was called: what the model is asked next.
CALLED = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "call_1", "content": "quick"}]  # fmt: skip
PARTS = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
# As Open WebUI's backend makes them (utils/payload.py, routers/openai.py, routers/tasks.py): the
# settings of a model, those that it does not know as they are; titles and tags as further chats.
# The last as LM Studio's plugin openai-compat-endpoint does (src/generator.ts).
SENT = [
    {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True},
     "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "frequency_penalty": 0.1,
     "presence_penalty": 0.0, "seed": 7, "stop": ["###"], "logit_bias": {"5": -1},
     "response_format": {"type": "text"}, "num_ctx": 2048, "num_keep": 24, "num_gpu": 1,
     "keep_alive": "5m", "use_mmap": True, "user": {"name": "x", "id": "1"}},
    {"messages": MESSAGES, "stream": False, "max_completion_tokens": 100, "chat_id": "1",
     "session_id": "2", "stop": ["e"], "tools": [], "tool_choice": None,
     "metadata": {"task": "title"}},
    {"messages": [*CALLED, {"role": "user", "content": PARTS}], "stream": True,
     "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto"},
]  # fmt: skip


def test_what_chat_programs_send_is_answered(server):
    for path in ("/chat/completions", "/v1/chat/completions"):
        for body in SENT:
            body = {"model": "wide", "max_tokens": 5, **body}
            reply = raw(server, post(body, path, User_Agent="Python/3.11 aiohttp/3.12"))
            assert b" 200 " in reply.split(b"\r\n")[0], reply
            assert (b"data: [DONE]" in reply) == body["stream"] and b'"error"' not in reply


def test_a_log_has_numbers_and_nothing_of_what_was_said(pack, model_path):
    log = io.StringIO()
    with serving(pack, model_path, log=log) as server, client(server) as api:
        reply = api.completions.create(**GOOD | {"prompt": "a secret fox"})
        raw(server, post(GOOD | {"model": "nobody", "prompt": "secret"}))
        raw(server, get("/health"))
        # Nothing in it is a control sequence (issue 72).
        raw(server, get("/%C2%9B31m%E2%80%AE%E2%80%A8%7F", method="A" * 3000))
        idle(server)
    written = log.getvalue()
    assert written.isascii() and written.replace("\n", "").isprintable()
    first, second, third, odd = map(json.loads, written.splitlines())
    assert (odd["method"], odd["path"]) == ("A" * 16, "/\x9b31m\u202e\u2028\x7f")
    assert "secret" not in written and reply.choices[0].text not in written
    assert (first["status"], first["task"], first["completion_tokens"]) == (200, "wide", 4)
    assert first["finish_reason"] == "length" and first["seconds"] > 0 and first["time"]
    assert (second["status"], second["model"]) == (404, "nobody")
    assert (third["path"], third["status"]) == ("/health", 200)
