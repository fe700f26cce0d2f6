"""Damaged and hostile files: each ends in our own error or is read, whatever is in it.

Inputs are drawn from a fixed seed, the same in every run; `--inputs 100000` draws more of them.
`fuzz.py` is guided by coverage and has no end.
"""

import contextlib
import copy
import json

import pytest
import yaml
from helpers import targets
from helpers.targets import CHATS, KEPT, PROMPTS, QUESTIONS, TARGETS, TEXTS, Shared, lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.reading import find_adapters
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.parsing import matches_end, parse_json

pytestmark = pytest.mark.slow

STRINGS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "a/b", "(a+)+$",
                     "[", "\ud800", "x" * 5000, "NaN", "float16", "0"]),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**65), st.floats(), STRINGS,
    st.sampled_from([10**400, -1, 0, 1e308, 5e-324]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=5,
)
# Text that is nearly JSON, put in place of a file.
NEARLY = st.sampled_from(
    [b"", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"null",
     b"1e999", b'{"a": 1, "a": 2}', b"9" * 5000, b'"\\ud800"', b"NaN", b"{}\r\n{}", b"\x00" * 64]
)  # fmt: skip


@st.composite
def damaged(draw, content, head=None):
    """Bytes with some changes; most of them in the first `head`, where the structure is."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = len(data) if head is None or draw(st.integers(0, 3)) == 0 else min(head, len(data))
        at = draw(st.integers(0, max(end - 1, 0)))
        kind = draw(st.sampled_from(["bit", "byte", "cut", "insert", "drop", "copy", "length"]))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.sampled_from(b'0123456789"{}[],:\x00\xff'))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "copy":
            data[at:at] = data[: draw(st.integers(0, 64))]
        elif kind == "length":
            data[:8] = draw(st.sampled_from([0, 1, len(data), 2**31, 2**63])).to_bytes(8, "little")
    return bytes(data)


@st.composite
def changed(draw, value):
    """A JSON value with some parts replaced, removed or added."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        place, key = root, 0
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 5)):
            inner = place[key]
            keys = sorted(inner, key=str) if isinstance(inner, dict) else range(len(inner))
            place, key = inner, draw(st.sampled_from(list(keys)))
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove" and place is not root:
            del place[key]
        elif kind == "add" and isinstance(place, dict):
            place[draw(STRINGS)] = draw(VALUES)
        else:
            place[key] = draw(VALUES)
    return root[0]


def as_json(strategy):
    """A JSON file of such values, or something that is nearly one."""
    dumped = strategy.map(lambda value: json.dumps(value).encode())
    return st.one_of(dumped, dumped, NEARLY, dumped.flatmap(damaged))


@pytest.fixture
def fuzz(request):
    """Calls a check with every input; an InputError is a good end, whatever else is raised not."""

    def run(strategy, check):
        """Check so many inputs."""

        @settings(
            max_examples=request.config.getoption("--inputs"), derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def inputs(one):
            try:
                check(one)
            except InputError as error:
                assert error.problems and all("\n" not in line for line in error.problems)
                str(error).encode()  # it can be printed

        inputs()

    return run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_weights_of_an_adapter(fuzz, shared, tmp_path, layout):
    target = targets.weights(shared, tmp_path, layout)
    fuzz(damaged(target.seeds[0], target.head), target.check)


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_config_of_an_adapter(fuzz, shared, tmp_path, layout):
    target = targets.config(shared, tmp_path, layout)
    fuzz(as_json(changed(json.loads(target.seeds[0]))), target.check)


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_manifest_of_a_pack(fuzz, shared, tmp_path, storage):
    target = targets.manifest(shared, tmp_path, storage)
    fuzz(as_json(changed(json.loads(target.seeds[0]))), target.check)


def test_file_of_a_compact_pack(fuzz, shared, tmp_path):
    target = targets.compact(shared, tmp_path)
    fuzz(damaged(target.seeds[0], target.head), target.check)


def test_index_of_a_compact_pack(fuzz, shared, tmp_path):
    target = targets.index(shared, tmp_path)
    index = changed(json.loads(target.seeds[0]))
    fuzz(index.map(lambda value: json.dumps(value).encode()), target.check)


def test_a_gguf(fuzz, shared, tmp_path):
    target = targets.gguf(shared, tmp_path)
    fuzz(damaged(target.seeds[0], target.head), target.check)


def test_a_gguf_adapter(fuzz, shared, tmp_path):
    target = targets.gguf_adapter(shared, tmp_path)
    fuzz(damaged(target.seeds[0], target.head), target.check)


ROWS = st.one_of(changed(PROMPTS), changed(CHATS), changed(TEXTS)).map(lines)


def test_rows_of_a_task(fuzz, shared, tmp_path):
    inputs = st.one_of(ROWS, NEARLY, ROWS.flatmap(damaged))
    fuzz(inputs, targets.rows(shared, tmp_path).check)


def test_prompts_without_answers(fuzz, shared, tmp_path):
    inputs = st.one_of(changed(QUESTIONS).map(lines), NEARLY)
    fuzz(inputs, targets.prompts(shared, tmp_path).check)


def test_config_of_a_run(fuzz, shared, tmp_path):
    target = targets.options(shared, tmp_path)
    dumped = changed(yaml.safe_load(target.seeds[0])).map(
        lambda value: yaml.dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    fuzz(st.one_of(dumped, NEARLY, dumped.flatmap(damaged)), target.check)


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_read_and_kept_ones_end_well(name, shared, tmp_path):
    target = TARGETS[name](shared, tmp_path)
    for seed in target.seeds:
        target.check(seed)
    for path in sorted((KEPT / name).glob("*")):
        with contextlib.suppress(InputError):
            target.check(path.read_bytes())


def test_budgets(fuzz):
    digits = st.text("0123456789.%eE-+ MGKBmgkb٣", max_size=12)
    fuzz(st.one_of(STRINGS, digits, VALUES), parse_budget)


@pytest.mark.parametrize(
    "text, why",
    [("NaN", "64 bits"), ('{"a": -Infinity}', "64 bits"), ("1e999", "64 bits"),
     ("1" * 30, "64 bits"), ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is there twice"),
     ('["\\ud800"]', "surrogate"), ("[" * 100_000, "nested too deeply"), ("{", "Expecting")],
)  # fmt: skip
def test_json_that_is_none(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_json():
    value = {"a": [1, -2.5, None, True, "ä\U0001f600", 2**64 - 1], "b": {}}
    assert (
        parse_json(json.dumps(value)) == parse_json(json.dumps(value, ensure_ascii=False)) == value
    )


def test_a_pattern_that_would_not_end():
    path = "model.layers.0.self_attn.q_proj"
    assert matches_end("q_proj", path) and matches_end(r"layers\.[0-3]\..*proj", path)
    assert not matches_end("proj", path)
    with pytest.raises(ValueError, match="more than 1 s"):
        matches_end("(a|aa)+", "a" * 60 + "!")


@pytest.mark.parametrize(
    "names, problem",
    [
        (["Q", "q"], "'q' is .* one with 'Q' on a Mac"),
        (["\u00e9t\u00e9", "E\u0301t\u00e9"], "is one with .* on a Mac"),
        (["a\nb"], "is not printable"),
        (["\u00e9" * 121], "has 242 bytes, expected at most 240"),
    ],
)
def test_names_that_a_mac_cannot_hold(tmp_path, names, problem):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=problem):
        find_adapters(tmp_path)
