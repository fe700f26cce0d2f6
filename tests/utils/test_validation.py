"""Problems of checked models: every one of them, a line each, with place, field and value."""

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.validation import Checked, expects, found_text


class Part(Checked):
    size: int = Field(gt=0)


def _even(value: int) -> int:
    if value % 2:
        raise expects("an even number")
    return value


class Whole(Checked):
    kind: Literal["a", "b"]
    share: float = Field(0.5, gt=0, le=1)
    many: int = Field(1, ge=1)
    even: Annotated[int, AfterValidator(_even)] = 0
    either: int | str = 0
    part: Part | None = None
    rows: tuple[Part, ...] = ()

    @field_validator("even")
    @classmethod
    def _with_many(cls, value: int, info: ValidationInfo) -> int:
        if value > 10 * info.data.get("many", value):
            raise ValueError("is more than ten times many; raise many")
        return value


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        ({"kind": "c"}, "kind", "found 'c', input should be 'a' or 'b'"),
        ({"share": 0.0}, "share", "found 0.0, input should be greater than 0"),
        ({"share": 10**5000}, "share", "found a number of thousands of digits, "),
        ({"even": 3}, "even", "found 3, expected an even number"),
        ({"even": 12}, "even", "is more than ten times many; raise many"),
        ({"either": []}, "either", "found [], "),
        ({"part": {}}, "part.size", "missing"),
        ({"rows": ({"size": 1}, {"size": 0})}, "rows.1.size", "found 0, "),
        ({"mny": 1}, "mny", "unknown key; did you mean 'many'?"),
        ({"zzz": 1}, "zzz", "unknown key; known: kind, share"),
    ],
)
def test_one_problem_is_one_line(wrong, field, words):
    values = {"kind": "a"} | wrong
    with pytest.raises(ConfigError) as caught:
        Whole(**values)
    (line,) = caught.value.problems
    assert line.startswith(f"{field}: {words}")
    with pytest.raises(ConfigError) as caught:
        Whole.read(values, "file.yaml")
    assert caught.value.problems == [f"file.yaml: {line}"]


def test_all_problems_at_once_and_unknown_keys_before_what_they_explain():
    values = {"kind": 1, "mny": 2, "part": {}, "share": 2, "even": 3}
    with pytest.raises(ConfigError) as caught:
        Whole.read(values, {"kind": "a.yaml"})
    assert [line.split(": ")[0] for line in caught.value.problems] == [
        "mny", "a.yaml", "share", "even", "part.size"
    ]  # fmt: skip


def test_good_values_are_kept_and_whole_numbers_are_floats():
    good = Whole(kind="a", share=1, part={"size": 2})
    assert (good.share, type(good.share), good.part) == (1.0, float, Part(size=2))
    other = good.replace(many=4)
    assert (other.many, other.part, good.many) == (4, good.part, 1)
    with pytest.raises(ConfigError, match="many: found 0, "):
        good.replace(many=0)
    with pytest.raises(ConfigError, match=r"^x\.json: found \[1\], "):
        Whole.read([1], "x.json")
    assert len(found_text("x" * 10_000)) < 250
