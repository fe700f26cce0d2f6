"""Other budgets that a run measured: the stops of one chart, of its slider and of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2c_mlx.utils.templates import percent, size

__all__ = ["Frontier", "planned_frontier", "slots_frontier"]

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Frontier:
    """What is lost at several budgets.

    Attributes:
        shares: bytes at every stop over the adapters' 16-bit bytes, rising.
        lines: label -> loss at every stop; a line is left out where it was not measured.
        unit: what the lines are in.
        base: loss of the base model in the same unit; the task adapters lose 0.
        pack: bytes of the pack over the adapters' 16-bit bytes, and what it loses.
        asked: the budget of the run in the unit of `shares`.
        says: every stop in words.
        header: names of the columns of `rows`.
        rows: every stop as a row of a table.
        planned: the stops are a plan's, a constant factor apart.
    """

    shares: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    unit: str
    base: float
    pack: tuple[float, float]
    asked: float
    says: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    planned: bool

    @property
    def nearest(self) -> int:
        """The stop nearest to the budget of the run."""
        return min(range(len(self.shares)), key=lambda k: abs(self.shares[k] - self.asked))


def planned_frontier(plan: Json, share: float, asked: float, measured: bool = True) -> Frontier:
    """The budgets that a plan was made for, with the regret expected on calibration rows.

    Args:
        plan: content of `plan.json`.
        share: bytes of the pack over the adapters' 16-bit bytes.
        asked: the budget over the adapters' 16-bit bytes.
        measured: False for a plan without rows, whose regrets are squared errors of dW.
    """
    what = "expected regret" if measured else "squared error of dW"
    found = plan["frontier"]
    labels = {"own": "an adapter per task"}
    if all(row["merged"] is not None for row in found):
        labels |= {"merged": "merged adapters only", "all": "the better of both"}
    shares = [f"{100 * row['share']:.2f}%" for row in found]
    says = [
        f"{at} of the bytes, {what}: "
        + ", ".join(f"{row[key]:.4f} with {label}" for key, label in labels.items())
        for at, row in zip(shares, found)
    ]
    return Frontier(
        shares=[row["share"] for row in found],
        lines={label: [row[key] for row in found] for key, label in labels.items()},
        unit=f"{what} on calibration rows" if measured else what,
        base=1.0,
        pack=(share, plan["regret"]),
        asked=asked,
        says=says,
        header=["budget", *labels.values()],
        rows=[[at, *(f"{row[key]:.4f}" for key in labels)] for at, row in zip(shares, found)],
        planned=True,
    )


def slots_frontier(rows: Sequence[Json]) -> Frontier | None:
    """The numbers of adapters that were measured on held-out rows, each at its best method.

    Args:
        rows: methods as in `bench.json`, with their `name` and `share`; of none there is nothing.
    """
    if not rows:
        return None
    best: dict[int, Json] = {}
    for row in sorted(rows, key=lambda row: (row["nbytes"], row["excess"], row["name"] != "pack")):
        if row["nbytes"]:
            best.setdefault(row["nbytes"], row)
    of = {row["name"]: row for row in rows}
    shares = [percent(row["share"]) for row in best.values()]
    says = [
        f"{size(nbytes)}, {at} of the bytes: {row['name']} loses {row['excess']:.4f} nats per"
        f" target token and keeps {percent(row['retention'])} of the gain"
        for (nbytes, row), at in zip(best.items(), shares)
    ]
    return Frontier(
        shares=[row["share"] for row in best.values()],
        lines={"best of each size": [row["excess"] for row in best.values()]},
        unit="excess (nats per target token)",
        base=of["base"]["excess"],
        pack=(of["pack"]["share"], of["pack"]["excess"]),
        asked=of["pack"]["share"],
        says=says,
        header=["of input", "best method", "excess", "gain kept"],
        rows=[
            [at, row["name"], f"{row['excess']:.4f}", percent(row["retention"])]
            for at, row in zip(shares, best.values())
        ],
        planned=False,
    )
