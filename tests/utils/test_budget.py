import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.utils.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "percent", "nbytes", "n_adapters"),
    [
        ("12.5%", 12.5, None, None),
        ("0.5%", 0.5, None, None),
        (".5%", 0.5, None, None),
        ("5 %", 5.0, None, None),
        ("40MB", None, 40_000_000, None),
        ("40 mb", None, 40_000_000, None),
        ("500KB", None, 500_000, None),
        ("1.5KB", None, 1_500, None),
        ("2GB", None, 2_000_000_000, None),
        ("1000B", None, 1_000, None),
        ("1KiB", None, 1 << 10, None),
        ("1MiB", None, 1 << 20, None),
        ("1GiB", None, 1 << 30, None),
        ("5", None, None, 5),
        (" 5 ", None, None, 5),
        ("5.0", None, None, 5),
    ],
)
def test_forms(text, percent, nbytes, n_adapters):
    budget = parse_budget(text)
    assert budget == Budget(text, percent, nbytes, n_adapters)
    assert [type(budget.nbytes), type(budget.n_adapters)] == [type(nbytes), type(n_adapters)]


@pytest.mark.parametrize(
    "text",
    ["", "abc", "%", "MB", "12%%", "2.5 adapters", "5 adapters", "2.5", "40XB", "1e3", "1 2", "nan"]
    + ["-3", "-3%", "inf", "5,5%", "0x5", "5\n5"],
)
def test_unreadable(text):
    with pytest.raises(BudgetError, match="not readable") as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value)
    assert "12.5%" in str(caught.value)


@pytest.mark.parametrize("text", ["0", "0%", "0MB", "0.0"])
def test_zero(text):
    with pytest.raises(BudgetError, match="must be above 0"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [
        ("12.5%", 1000, 125),
        ("12.5%", 1001, 125),
        ("100%", 12345, 12345),
        ("250%", 100, 250),
        ("1KB", 7, 1000),
        ("1MiB", 7, 1_048_576),
        ("5", 1000, None),
    ],
)
def test_allowed_bytes(text, total, allowed):
    assert parse_budget(text).allowed_bytes(total) == allowed


@pytest.mark.parametrize(
    ("text", "sizes", "largest", "count"),
    [
        ("25%", [9973] * 24, 9973, 6),
        ("24.9%", [9973] * 24, 9973, 5),
        # A merge that is larger than the mean input lowers the count.
        ("25%", [9973] * 24, 9974, 5),
        ("100%", [100, 200, 300], 350, 3),
        ("400%", [100, 200, 300], 300, 3),
        ("99.9%", [100, 200, 300], 300, 1),
        ("600B", [100, 200, 300], 350, 3),
        ("599B", [100, 200, 300], 200, 2),
        ("599B", [100, 200, 300], 100, 3),
        ("300B", [100, 200, 300], 300, 1),
        ("2", [100, 200, 300], 300, 2),
        ("9", [100, 200, 300], 300, 3),
    ],
)
def test_allowed_adapters(text, sizes, largest, count):
    assert parse_budget(text).allowed_adapters(sizes, largest) == count


@settings(max_examples=100)
@given(
    st.integers(2, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 10**9),
)
def test_share_of_equal_adapters_is_exact(pair, size):
    n, k = pair
    percent = 100 * k / n
    if float(f"{percent:.6f}") == percent:
        assert parse_budget(f"{percent:.6f}%").allowed_adapters([size] * n, size) == k


def test_too_small_names_both_sizes():
    with pytest.raises(BudgetError) as caught:
        parse_budget("1%").allowed_adapters([2_000_000] * 10, 1_500_000)
    (problem,) = caught.value.problems
    assert "1%" in problem
    assert "200,000 bytes" in problem
    assert "1,500,000" in problem
    assert "7.50%" in problem


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("size", "n"), [(12_345, 3), (1_234_321, 3)])
def test_advice_can_be_followed(size, n, which):
    sizes = [size] * n
    with pytest.raises(BudgetError) as caught:
        parse_budget("1%").allowed_adapters(sizes, size)
    advice = re.search(r"at least (\S+%) or (\S+KB)", str(caught.value)).group(which + 1)
    assert parse_budget(advice).allowed_adapters(sizes, size) == 1


@pytest.mark.parametrize("text", ["9" * 400 + "MB", "9" * 400 + "%"])
def test_number_beyond_float(text):
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert budget.allowed_adapters([100] * 4, 100) == 4


def test_less_than_a_byte():
    with pytest.raises(BudgetError, match="above 0"):
        parse_budget("0.4B")
