"""Changes in JSON and in the header of safetensors that leave them well formed."""

import json

_ODD = [None, True, False, 0, 1, -1, 2.5, 1e308, 5e-324, 2**63, 2**64, 10**30, float("nan"),
        "", ".", "..", "../x", "/etc/passwd", "a\x00b", "\ud800", "x" * 300, "float16", "(a+)+$",
        "[", [], {}, [[]], [0], {"": 0}, [None, "a"], {"a": {"a": 1}}]  # fmt: skip
_ODD_KEYS = ["", "..", "a/b", "r", "storage", "use_dora", "\ud800", "messages", "(a|aa)+$"]


def changed(data, draw):
    """One line of JSON with a value replaced, removed or added somewhere in it."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    place, key = [json.loads(lines[at])], 0
    root = place
    while isinstance(place[key], dict | list) and place[key] and draw.random() < 0.85:
        place = place[key]
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
    kind = draw.random()
    if kind < 0.2 and place is not root:
        del place[key]
    elif kind < 0.4 and isinstance(place, dict):
        place[draw.choice(_ODD_KEYS)] = draw.choice(_ODD)
    else:
        place[key] = draw.choice(_ODD)
    lines[at] = json.dumps(root[0]).encode()
    return b"\n".join(lines)


def changed_header(data, draw):
    """The same in the header of safetensors, with its length right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = changed(data[8:end], draw)
    return len(header).to_bytes(8, "little") + header + data[end:]
