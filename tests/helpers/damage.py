"""Changes in JSON and in the header of safetensors that leave them well formed."""

import contextlib
import hashlib
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


# Text that is nearly JSON, in place of a file.
_NEARLY = [b"", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"null",
           b"1e999", b'{"a": 1, "a": 2}', b"9" * 5000, b'"\\ud800"', b"NaN", b"{}\r\n{}",
           b"\x00" * 64]  # fmt: skip


def damaged(data, draw, head=None):
    """A file with some damage: in its JSON, in its bytes, or in the place of all of it.

    Args:
        data: a good file.
        draw: a `random.Random`.
        head: so many bytes at the front hold the structure, the rest is numbers; None: all.
    """
    if draw.random() < 0.05:
        return draw.choice(_NEARLY)
    if draw.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            for _ in range(draw.randint(1, 3)):
                data = (changed_header if head else changed)(data, draw)
            return data
    result = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        end = len(result) if head is None or draw.random() < 0.25 else min(head, len(result))
        at, kind = draw.randrange(max(end, 1)), draw.randrange(7)
        if kind == 0 and result:
            result[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and result:
            result[at] = draw.choice(b'0123456789"{}[],:\x00\xff')
        elif kind == 2:
            del result[at:]
        elif kind == 3:
            result[at:at] = draw.randbytes(draw.randint(1, 12))
        elif kind == 4:
            del result[at : at + draw.randint(1, 64)]
        elif kind == 5:
            result[at:at] = result[: draw.randint(0, 64)]
        else:
            length = draw.choice([0, 1, len(result), 2**31, 2**63])
            result[:8] = length.to_bytes(8, "little")
    return bytes(result)


def true_of_files(pack, *names):
    """The fields of a manifest that is true of some files, as a hostile one is."""
    files = {}
    for name in names:
        content = (pack / name).read_bytes()
        files[name] = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"files": files, "nbytes": sum(entry["nbytes"] for entry in files.values())}


def rehash(pack):
    """Make a pack's manifest true of its files again."""
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest |= true_of_files(pack, *manifest["files"])
    (pack / "manifest.json").write_text(json.dumps(manifest))
