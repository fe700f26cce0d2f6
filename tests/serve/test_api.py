"""What is refused by name, and what a model's call of tools may be."""

import importlib
import json
import pkgutil

import mlx_lm.tool_parsers
import pytest

from d2c_mlx.serve.requests import RequestError, read_request
from d2c_mlx.serve.text import read_tool_calls

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# What would be ignored -> values that mean nothing.
IGNORED = [
    ("parallel_tool_calls", False, [True]),
    ("reasoning_effort", "low", []),
    ("ignore_eos", True, [False]),
    ("min_tokens", 5, [0]),
    ("num_draft_tokens", 3, [0]),
    ("continue_final_message", True, [False]),
    ("repeat_penalty", 1.1, [1, 1.0]),
    ("mirostat", 2, [0]),
    ("tfs_z", 0.5, [1]),
    ("num_predict", 5, []),
    ("think", True, []),
]


def read(**fields):
    return read_request(json.dumps(CHAT | fields).encode(), True)


@pytest.mark.parametrize(("name", "value", "harmless"), IGNORED)
def test_what_would_be_ignored_is_refused(name, value, harmless):
    with pytest.raises(RequestError, match=f"^{name}: not supported; leave it out ") as caught:
        read(**{name: value})
    assert caught.value.status == 400 and caught.value.field == name
    for one in (*harmless, None):
        read(**{name: one})


def test_the_choice_of_tools():
    for choice in ("auto", None):
        assert read(tools=TOOLS, tool_choice=choice).tools == TOOLS
    assert read(tools=TOOLS, tool_choice="none").tools == [] == read(tool_choice="none").tools
    for choice in ("required", TOOLS[0], True, {}):
        with pytest.raises(RequestError, match="^tool_choice: found .*, expected auto or none$"):
            read(tools=TOOLS, tool_choice=choice)


JUNK = [
    "", "x", "[1]", '"x"', "{}", "null", '{"name": 1}', "f", "f()", "f(", "f(x)", "f(x=y)",
    "[f(a)]", "f(1, x=2)", "<function=f>", "<function=f></function>", "call:f{", "call:f{x:1}",
    "f:0", "functions.f:0<|tool_call_argument_begin|>{",
    "functions.f:0<|tool_call_argument_begin|>[1]",
    '{"name": "f"}', '[{"name": "f"}, 1]', '<invoke name="f">', "[TOOL_CALLS]f[ARGS]{", "\ud800",
]  # fmt: skip
PARSERS = [one.name for one in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]


@pytest.mark.parametrize("name", PARSERS)
def test_a_call_has_a_name_and_arguments_or_is_none(name):
    """With all of mlx-lm's parsers."""
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call
    for text in JUNK:
        for tools in (None, TOOLS, [{}]):
            try:
                found = read_tool_calls(parser, text, tools)
            except ValueError:
                continue
            assert found and all(isinstance(one["name"], str) for one in found)
            assert all("arguments" in one for one in found)


def test_what_is_logged_of_a_call_has_nothing_of_its_text():
    def parser(text, tools):
        return json.loads(text)

    for text in ("secret", '["secret"]', '{"secret": "secret"}'):
        with pytest.raises(ValueError) as caught:
            read_tool_calls(parser, text, None)
        assert "secret" not in str(caught.value)
