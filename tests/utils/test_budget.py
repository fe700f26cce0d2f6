import pytest

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.utils.errors import BudgetError

# Share, bytes, adapters.
FORMS = {
    "12.5%": (12.5, None, None), ".5%": (0.5, None, None), "5 %": (5.0, None, None),
    "40MB": (None, 40_000_000, None), "40 mb": (None, 40_000_000, None),
    "1.5KB": (None, 1_500, None), "2GB": (None, 2_000_000_000, None), "1000B": (None, 1_000, None),
    "1KiB": (None, 1 << 10, None), "1MiB": (None, 1 << 20, None), "1GiB": (None, 1 << 30, None),
    "5": (None, None, 5), " 5 ": (None, None, 5), "5.0": (None, None, 5),
}  # fmt: skip
BAD = ["", "%", "MB", "12%%", "5 adapters", "2.5", "40XB", "1e3", "1 2", "nan", "-3", "-3%", "inf",
       "5,5%", "0x5", "5\n5", "0", "0%", "0MB", "0.4B", "9" * 400 + "MB"]  # fmt: skip


def test_forms_and_the_bytes_they_allow():
    for text, parts in FORMS.items():
        budget = parse_budget(text)
        assert budget == Budget(text, *parts)
        assert [type(budget.nbytes), type(budget.n_adapters)] == [type(x) for x in parts[1:]]
    for text, allowed in (("12.5%", 125), ("250%", 2502), ("1KB", 1000), ("5", None)):
        assert parse_budget(text).allowed_bytes(1001) == allowed


@pytest.mark.parametrize("text", BAD)
def test_unreadable_or_nothing(text):
    with pytest.raises(BudgetError, match="budget: found") as caught:
        parse_budget(text)
    assert repr(text)[:40] in str(caught.value)
