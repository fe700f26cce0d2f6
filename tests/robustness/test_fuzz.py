"""Damaged and hostile files: each ends in our own error or is read, whatever is in it.

Inputs are drawn from a fixed seed, the same in every run; `--inputs 100000` draws more of them.
`fuzz.py` is guided by coverage and has no end.
"""

import json
import random

import pytest
from helpers.damage import damaged
from helpers.targets import KEPT, TARGETS, Shared

from d2c_mlx.adapters.reading import find_adapters
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.parsing import matches_end, parse_json


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_read_and_all_others_end_well(name, shared, tmp_path, request):
    """Those that are kept reached something new when `fuzz.py` ran."""
    target, draw = TARGETS[name](shared, tmp_path), random.Random(name)
    for seed in target.seeds:
        target.check(seed)
    for path in sorted((KEPT / name).glob("*")):
        target.take(path.read_bytes())
    for i in range(request.config.getoption("--inputs")):
        data = damaged(draw.choice(target.seeds), draw, target.head)
        try:
            target.take(data)
        except Exception as error:
            (tmp_path / "bad").write_bytes(data)
            raise AssertionError(f"input {i}, which is {tmp_path / 'bad'}") from error


@pytest.mark.parametrize(
    "text, why",
    [("NaN", "64 bits"), ('{"a": -Infinity}', "64 bits"), ("1e999", "64 bits"),
     ("1" * 30, "64 bits"), ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is there twice"),
     ('["\\ud800"]', "surrogate"), ("[" * 100_000, "nested too deeply"), ("{", "Expecting")],
)  # fmt: skip
def test_json_that_is_none(text, why):
    pytest.raises(ValueError, parse_json, text).match(why)


def test_json_and_a_pattern_that_would_not_end():
    value = {"a": [1, -2.5, None, True, "ä\U0001f600", 2**64 - 1], "b": {}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value
    path = "model.layers.0.self_attn.q_proj"
    assert matches_end("q_proj", path) and matches_end(r"layers\.[0-3]\..*proj", path)
    assert not matches_end("proj", path)
    pytest.raises(ValueError, matches_end, "(a|aa)+", "a" * 60 + "!").match("more than 1 s")


def test_names_that_a_mac_cannot_hold(tmp_path):
    for i, (names, problem) in enumerate([
        (["Q", "q"], "'q' is .* one with 'Q' on a Mac"),
        (["\u00e9t\u00e9", "E\u0301t\u00e9"], "is one with .* on a Mac"),
        (["a\nb"], "is not printable"),
        (["\u00e9" * 121], "has 242 bytes, expected at most 240"),
    ]):  # fmt: skip
        for name in names:
            (tmp_path / str(i) / name).mkdir(parents=True)
        pytest.raises(InputError, find_adapters, tmp_path / str(i)).match(problem)
