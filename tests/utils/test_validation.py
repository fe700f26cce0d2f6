"""Problems of checked models: every one of them, a line each, place, field, found and expected."""

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator

from d2c_mlx.utils.errors import ConfigError, PackError, Problem
from d2c_mlx.utils.validation import Checked, expects, found_text, refused


class Part(Checked):
    size: int = Field(gt=0)
    note: str = Field("", json_schema_extra={"remedy": "write it again"})


def _even(value: int) -> int:
    if value % 2:
        raise expects("an even number")
    return value


class Open(Checked):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Part]
    first: Part


class Whole(Checked):
    kind: Literal["a", "b"]
    names: tuple[Literal["x", "y"], ...] = ()
    share: float = Field(0.5, gt=0, le=1)
    many: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, le=1_000_000)
    limit: str = Field("", max_length=3, json_schema_extra={"expected": "bytes"})
    even: Annotated[int, AfterValidator(_even)] = 0
    either: int | str = 0
    yes: bool = False
    path: str = Field("here", json_schema_extra={"missing": "not given; name it"})
    part: Part | None = None
    parts: dict[str, Part] = {}
    rows: tuple[Part, ...] = ()

    @field_validator("even")
    @classmethod
    def _with_seed(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("seed", value):
            raise refused("is more than the seed; raise the seed")
        return value


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"kind": "c"}, "kind: found 'c', expected one of ['a', 'b']"),
        ({"names": ("x", "z")}, "names: found ('x', 'z'), expected some of ['x', 'y']"),
        ({"names": 3}, "names: found 3, expected a list of strings"),
        ({"share": 0.0}, "share: found 0.0, expected a number above 0 and at most 1"),
        ({"share": float("nan")}, "share: found nan, expected a number above 0 and at most 1"),
        ({"share": 10**400}, "share: found a number beyond 64 bits, expected float"),
        ({"share": "1"}, "share: found '1', expected float"),
        ({"many": 0}, "many: found 0, expected 1 or more"),
        ({"many": True}, "many: found True, expected int"),
        ({"many": 1.5}, "many: found 1.5, expected int"),
        ({"seed": -1}, "seed: found -1, expected 0 to 1,000,000"),
        ({"limit": 4}, "limit: found 4, expected bytes"),
        ({"limit": "long"}, "limit: found 'long', expected bytes"),
        ({"even": 3, "seed": 4}, "even: found 3, expected an even number"),
        ({"even": 2}, "even: is more than the seed; raise the seed"),
        ({"yes": "no"}, "yes: found 'no', expected true or false"),
        ({"part": 3}, "part: found 3, expected an object with size, note"),
        ({"part": {}}, "part.size: missing, expected int"),
        ({"part": {"size": 0}}, "part.size: found 0, expected a whole number above 0"),
        ({"part": {"size": 1, "note": 2}},
         "part.note: found 2, expected str; write it again"),
        ({"parts": []}, "parts: found [], expected an object"),
        ({"parts": {"p": {"size": "1"}}}, "parts.p.size: found '1', expected int"),
        ({"rows": ({"size": 1}, {"size": 0})},
         "rows.1.size: found 0, expected a whole number above 0"),
        ({"mny": 1}, "mny: unknown key; did you mean 'many'?"),
        ({"part": {"size": 1, "zzz": 1}}, "part.zzz: unknown key; known: size, note"),
    ],
)  # fmt: skip
def test_one_problem_is_one_line(wrong, line):
    values = {"kind": "a"} | wrong
    with pytest.raises(ConfigError) as caught:
        Whole(**values)
    assert caught.value.problems == [line]
    with pytest.raises(ConfigError) as caught:
        Whole.read(values, "file.yaml")
    assert caught.value.problems == [f"file.yaml: {line}"]


def test_the_members_of_a_union_are_one_problem():
    with pytest.raises(ConfigError) as caught:
        Whole(kind="a", either=[])
    (line,) = caught.value.problems
    assert line.startswith("either: found [], expected ")


def test_all_problems_at_once_and_unknown_keys_before_what_they_explain():
    values = {"mny": 2, "kind": 1, "part": {"sise": 3}, "share": 2, "even": 3, "parts": {"q": 1}}
    with pytest.raises(ConfigError) as caught:
        Whole.read(values, {"kind": "a.yaml"})
    assert [line.split(": ")[0] for line in caught.value.problems] == [
        "mny", "a.yaml", "share", "even", "part.sise", "part.size", "parts.q"
    ]  # fmt: skip


def test_keys_that_are_let_in_are_checked_by_their_type():
    with pytest.raises(ConfigError) as caught:
        Open.read({"first": {"size": 1}, "other": {"size": 0}, "more": 5})
    assert caught.value.problems == [
        "other.size: found 0, expected a whole number above 0",
        "more: found 5, expected an object with size, note",
    ]
    assert Open(first=Part(size=1), other=Part(size=2)).other.size == 2


def test_what_is_not_even_a_mapping():
    with pytest.raises(ConfigError) as caught:
        Whole.read([1], "x.json")
    (line,) = caught.value.problems
    assert line.startswith("x.json: found [1], expected an object with kind, names")


def test_a_model_has_its_own_error_remedy_and_words_for_what_is_missing():
    class Manifest(Checked):
        model_config = ConfigDict(extra="allow")
        error = PackError
        remedy = "write the pack again"
        nbytes: int
        name: str = Field(json_schema_extra={"missing": "not given; name the pack"})

    with pytest.raises(PackError) as caught:
        Manifest.read({"nbytes": "5", "else": 1}, "manifest.json")
    assert caught.value.problems == [
        "manifest.json: nbytes: found '5', expected int; write the pack again",
        "manifest.json: name: not given; name the pack",
    ]


def test_good_values_are_kept_and_whole_numbers_are_floats():
    good = Whole(kind="a", share=1, part={"size": 2}, parts={"p": {"size": 3}})
    assert (good.share, good.part, good.parts["p"].size) == (1.0, Part(size=2), 3)
    assert isinstance(good.share, float)
    other = good.replace(many=4)
    assert (other.many, other.part, good.many) == (4, good.part, 1)
    with pytest.raises(ConfigError, match="many: found 0, expected 1 or more"):
        good.replace(many=0)


def test_values_are_repeated_in_part_if_they_are_long():
    assert len(found_text("x" * 10_000)) < 250 and found_text(-(10**5000)).startswith("a number")


def test_a_problem_in_words():
    assert str(Problem("seed", "'x'", "int", "a.yaml", "mend it")) == (
        "a.yaml: seed: found 'x', expected int; mend it"
    )
    assert str(Problem("", said="no such file", place="a.yaml")) == "a.yaml: no such file"
    assert str(Problem("seed", expected="int")) == "seed: missing, expected int"
