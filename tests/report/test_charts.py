"""Charts: text is text, and every mark says its numbers."""

import html
import re

from d2c_mlx.report.charts import memory_bar


def test_a_mark_says_its_bytes_and_no_name_is_markup():
    memory = [{"context": 9, "weights": 1_000_000, "adapter": 2_000_000, "kv_cache": 1, "rest": 1}]
    phone = {"methods": {"a<i>\x1b[2J": {"memory": memory}}, "device": {"memory": 9_000_000}}
    svg = memory_bar(phone)
    titles = [html.unescape(title) for title in re.findall("<title>(.*?)</title>", svg)]
    assert titles[:2] == [
        "a<i>\\x1b[2J, weights: 1.00 MB at 9 tokens",
        "a<i>\\x1b[2J, adapter: 2.00 MB at 9 tokens",
    ]
    assert "<i>" not in svg and "\x1b" not in svg
