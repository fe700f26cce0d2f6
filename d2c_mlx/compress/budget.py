"""Storage budgets: "12.5%" of the adapters' own bytes, "40MB", or "5" adapters.

A budget in bytes counts adapter files (weights and configs) and a router, not the manifest. If the
manifest counted, 25 % of 24 equal adapters would hold five.
"""

import re
from dataclasses import dataclass

from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.parsing import bytes_of

_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Budget:
    """A storage budget; exactly one of `percent`, `nbytes` and `n_adapters` is set.

    `parse_budget` makes one.

    Attributes:
        text: the budget as the user wrote it.
        percent: percentage of the bytes of all input adapters, written in mlx-lm's layout in the
            dtype of the base's activations (16 bit, except for a base stored in float32).
        nbytes: bytes of all adapter files together (weights and configs; 1 MB = 1,000,000).
        n_adapters: number of adapters.
    """

    text: str
    percent: float | None = None
    nbytes: int | None = None
    n_adapters: int | None = None

    @property
    def in_bytes(self) -> bool:
        """True if a plan chooses what is stored; False if adapters are merged to a number."""
        return self.n_adapters is None

    def allowed_bytes(self, total: int) -> int | None:
        """Bytes of a pack of adapters of `total` bytes; None if only their number counts."""
        return self.nbytes if self.percent is None else int(total * self.percent / 100)


def parse_budget(text: str) -> Budget:
    """Parse a budget such as "12.5%", "40MB" (1 MB = 1,000,000), "40MiB" or "5".

    Use `parsing.bytes_of` where only a size in bytes is meant.

    Raises:
        BudgetError: the text is unreadable, or the budget is zero or negative.
    """
    text = str(text)  # YAML gives a number of adapters as one
    nbytes, match = bytes_of(text), _FORM.fullmatch(text)
    if nbytes:
        return Budget(text, nbytes=nbytes)
    number = float(match[1]) if match else 0.0
    if match and match[2] and 0 < number < 1e12:
        return Budget(text, percent=number)
    if 0 < number < 1e12 and number.is_integer():
        return Budget(text, n_adapters=int(number))
    raise BudgetError(
        f'budget: found {text[:40]!r}, expected more than 0, such as "12.5%", "40MB", "500KB" or a'
        ' number of adapters such as "5"'
    )
