"""Charts of names that no font has, or that are longer than the chart."""

import html
import re

import pytest

from d2c_mlx.report.charts import dendrogram, memory_bar

# A warning is an error here.
NAMES = ["数字-德", "عربي", "हिन्दी", "a\tb", "🦊 fox", "exactly-twenty-eight-letters"]


def tree(names):
    """The tree of adapters that are all a little alike, each stored for itself."""
    n = len(names)
    cosines = [[1.0 if i == j else 0.1 for j in range(n)] for i in range(n)]
    return dendrogram(names, cosines, list(range(n)), {})


def drawn(svg):
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


@pytest.mark.parametrize("n", [1, 5, 40])
def test_names_of_any_script_are_drawn_as_they_are(n):
    names = (NAMES * n)[:n] + NAMES
    found = drawn(tree(names))
    assert all(found.count(name) == names.count(name) for name in NAMES)


@pytest.mark.parametrize("letter", ["x", "W", "数", "ع"])
@pytest.mark.parametrize("n", [2, 30])
def test_long_names_leave_room_for_the_chart(letter, n):
    names = [f"begin-{letter * 100}-end{i}" for i in range(n)]
    svg = tree(names)
    (wide, high) = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    assert wide < 72 * 4.7 and high < 72 * (0.24 * n + 1)
    for i in range(n):
        assert sum(one.startswith("begin-") and one.endswith(f"-end{i}") for one in drawn(svg)) == 1


def test_a_long_name_of_a_device():
    memory = [{"context": 9, "weights": 1, "adapter": 1, "kv_cache": 1, "rest": 1}]
    phone = {"methods": {"pack": {"memory": memory}}, "device": {"name": "数" * 90, "memory": 9}}
    assert f"limit of {'数' * 7}…{'数' * 6}" in drawn(memory_bar(phone))


def test_control_characters_of_a_name_are_not_drawn():
    svg = tree(["a\x1b[2J\u202e-->", "b"])
    assert drawn(svg).count("a\\x1b[2J\\u202e-->") == 1
    assert "\x1b" not in svg and "\u202e" not in svg and "--><" not in svg


def test_a_join_says_its_most_alike_pair_and_whether_they_share_an_adapter():
    cosines = [[1.0, 0.4, 0.1], [0.4, 1.0, 0.25], [0.1, 0.25, 1.0]]
    svg = dendrogram(["<i>a", 'b"', "c"], cosines, [0, 0, 1], {0: "#3b82c4"})
    assert [html.unescape(one) for one in re.findall("<title>(.*?)</title>", svg)] == [
        '<i>a and b": cosine 0.400; in the pack they share an adapter',
        'b" and c: cosine 0.250; in the pack they have an adapter each',
    ]
    assert "<i>" not in svg
