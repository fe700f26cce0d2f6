"""Text of strangers is text in Markdown, HTML and on a terminal, and a budget if it can be read."""

import json

import pytest
from d2c_mlx_cli.say import say, say_json

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.templates import code, markdown, size, templates_of

ESCAPED = {
    "gec-de_2": "gec-de_2", "_x_ a__b": r"\_x\_ a\_\_b", "a|b`c": r"a\|b\`c",
    "<b>&": "&lt;b&gt;&amp;", "[x](javascript:1)": r"\[x\](javascript:1)", "# h": r"\# h",
    "- x": r"\- x", "1. x": r"1\. x", "https://e.example": r"https\://e.example",
    "www.e.example @you": r"www\.e.example \@you", "日本 ключ": "日本 ключ",
    "a\nb\x1b[31m\x9b\u202e": r"a\\nb\\x1b\[31m\\x9b\\u202e",
}  # fmt: skip
SIZES = {0: "0 bytes", 999: "999 bytes", 1000: "1 KB", 999_499: "999 KB", 999_500: "1 MB",
         12_345_678: "12.3 MB", 999_499_999: "999 MB", 999_500_000: "1 GB"}  # fmt: skip


def test_text_is_no_markdown_and_sizes_have_three_digits_and_a_unit():
    assert {text: markdown(text) for text in ESCAPED} == ESCAPED
    assert code("a|b") == r"`a\|b`" and code("a`b") == "`` a`b ``" and code("``") == "``` `` ```"
    assert {nbytes: size(nbytes) for nbytes in SIZES} == SIZES


@pytest.mark.parametrize("kind", ["md", "html"])
def test_templates_escape_what_no_filter_does(kind):
    environment = templates_of("d2c_mlx.report").overlay(autoescape=kind == "html")
    shown = environment.from_string("{{ x }} {{ 1.5 }}").render(x="<i>\x1b[2J|")
    assert shown.endswith(" 1.5") and "<i>" not in shown and "\x1b" not in shown


def test_nothing_steers_the_terminal(capsys):
    text = "a\x1b[2J\x9b1m\u202e\x7f\udc80 日本\nb"
    say(text)
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b1m\\u202e\\x7f\\udc80 日本\nb\n"
    say_json({text: "\U000e0001"})
    out = capsys.readouterr().out
    assert json.loads(out) == {text: "\U000e0001"} and "日本" in out
    assert all(c.isprintable() or c == "\n" for c in out)


# Share, bytes, adapters.
FORMS = {
    "12.5%": (12.5, None, None), ".5%": (0.5, None, None), "5 %": (5.0, None, None),
    "40MB": (None, 40_000_000, None), "40 mb": (None, 40_000_000, None),
    "1.5KB": (None, 1_500, None), "2GB": (None, 2_000_000_000, None), "1000B": (None, 1_000, None),
    "1KiB": (None, 1 << 10, None), "1MiB": (None, 1 << 20, None), "1GiB": (None, 1 << 30, None),
    "5": (None, None, 5), " 5 ": (None, None, 5), "5.0": (None, None, 5),
}  # fmt: skip
BAD = ["", "%", "MB", "12%%", "5 adapters", "2.5", "40XB", "1e3", "1 2", "nan", "-3", "-3%", "inf",
       "5,5%", "0x5", "5\n5", "0", "0%", "0MB", "0.4B", "9" * 400 + "MB"]  # fmt: skip


def test_forms_and_the_bytes_they_allow():
    for text, parts in FORMS.items():
        budget = parse_budget(text)
        assert budget == Budget(text, *parts)
        assert [type(budget.nbytes), type(budget.n_adapters)] == [type(x) for x in parts[1:]]
    for text, allowed in (("12.5%", 125), ("250%", 2502), ("1KB", 1000), ("5", None)):
        assert parse_budget(text).allowed_bytes(1001) == allowed


@pytest.mark.parametrize("text", BAD)
def test_unreadable_or_nothing(text):
    with pytest.raises(BudgetError, match="budget: found") as caught:
        parse_budget(text)
    assert repr(text)[:40] in str(caught.value)
