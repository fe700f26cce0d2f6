"""Charts of names that no font has, or that are longer than the chart."""

import html
import re

import pytest

from d2c_mlx.report.charts import heatmap, memory_bar

# A warning is an error here.
NAMES = ["数字-德", "عربي", "हिन्दी", "a\tb", "🦊 fox", "exactly-twenty-eight-letters"]


def drawn(svg):
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


@pytest.mark.parametrize("n", [1, 5, 40])
def test_names_of_any_script_are_drawn_as_they_are(n):
    names = (NAMES * n)[:n] + NAMES
    losses = {"values": [[1.0] * len(names)] * len(names), "adapters": names, "tasks": names}
    found = drawn(heatmap(losses, [0] * len(names)))
    assert all(found.count(name) == 2 * names.count(name) for name in NAMES)


@pytest.mark.parametrize("letter", ["x", "W", "数", "ع"])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_long_names_leave_room_for_the_chart(letter, n):
    names = [f"begin-{letter * 100}-end{i}" for i in range(n)]
    losses = {"values": [[1.0] * n] * n, "adapters": names, "tasks": names}
    svg = heatmap(losses, [0] * n)
    (wide, high) = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    assert wide < 72 * max(4.6, 0.28 * n + 1.9) and high < wide
    for i in range(n):
        assert sum(one.startswith("begin-") and one.endswith(f"-end{i}") for one in drawn(svg)) >= 2


def test_a_long_name_of_a_device():
    memory = [{"context": 9, "weights": 1, "adapter": 1, "kv_cache": 1, "rest": 1}]
    phone = {"methods": {"pack": {"memory": memory}}, "device": {"name": "数" * 90, "memory": 9}}
    assert f"limit of {'数' * 7}…{'数' * 6}" in drawn(memory_bar(phone))


def test_control_characters_of_a_name_are_not_drawn():
    names = ["a\x1b[2J\u202e-->"]
    svg = heatmap({"values": [[1.0]], "adapters": names, "tasks": names}, [0])
    assert drawn(svg).count("a\\x1b[2J\\u202e-->") == 2
    assert "\x1b" not in svg and "\u202e" not in svg and "--><" not in svg
