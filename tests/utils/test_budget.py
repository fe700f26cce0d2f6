import pytest

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.utils.errors import BudgetError

FORMS = {
    "12.5%": (12.5, None, None), ".5%": (0.5, None, None), "5 %": (5.0, None, None),
    "40MB": (None, 40_000_000, None), "40 mb": (None, 40_000_000, None),
    "1.5KB": (None, 1_500, None), "2GB": (None, 2_000_000_000, None), "1000B": (None, 1_000, None),
    "1KiB": (None, 1 << 10, None), "1MiB": (None, 1 << 20, None), "1GiB": (None, 1 << 30, None),
    "5": (None, None, 5), " 5 ": (None, None, 5), "5.0": (None, None, 5),
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_forms(text):
    budget = parse_budget(text)
    assert budget == Budget(text, *FORMS[text])
    assert [type(budget.nbytes), type(budget.n_adapters)] == [type(x) for x in FORMS[text][1:]]


@pytest.mark.parametrize(
    "text",
    ["", "%", "MB", "12%%", "5 adapters", "2.5", "40XB", "1e3", "1 2", "nan", "-3", "-3%", "inf",
     "5,5%", "0x5", "5\n5", "0", "0%", "0MB", "0.4B", "9" * 400 + "MB"],
)  # fmt: skip
def test_unreadable_or_nothing(text):
    with pytest.raises(BudgetError, match="budget: found") as caught:
        parse_budget(text)
    assert repr(text)[:40] in str(caught.value) and "12.5%" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [("12.5%", 1001, 125), ("100%", 12345, 12345), ("250%", 100, 250), ("1KB", 7, 1000),
     ("5", 1000, None)],
)  # fmt: skip
def test_allowed_bytes(text, total, allowed):
    assert parse_budget(text).allowed_bytes(total) == allowed
