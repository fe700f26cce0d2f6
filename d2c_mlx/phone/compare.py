"""Two results of the phone benchmark side by side. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from d2c_mlx.evaluate.answers import METRIC_NAMES
from d2c_mlx.phone.tables import Json, _mb, _metrics, _ms, _table
from d2c_mlx.utils.errors import PackError

__all__ = ["compare_phones"]

# What must be the same in two results that are compared: words, and where it is.
_SAME = {
    "base model (sha256 of its files)": ("model", "source_sha256"),
    "bits of the base": ("model", "bits"),
    "pack (sha256 of its manifest)": ("pack", "manifest_sha256"),
    "contexts": ("options", "contexts"),
    "decoded tokens": ("options", "decode"),
}


def compare_phones(first: Json, second: Json) -> str:
    """Two results side by side as Markdown: what differs in the set-up, then every measure.

    Raises:
        PackError: they measure something else: another model, pack or contexts; one line each.
    """
    problems = [
        f"compare: {words}: found {second[part][key]}, expected {first[part][key]} as in the first"
        " result; measure both with the same"
        for words, (part, key) in _SAME.items()
        if first[part][key] != second[part][key]
    ]
    if problems:
        raise PackError(problems)
    both = first, second
    setup = [
        ("device", *(one["device"]["name"] for one in both)),
        ("machine", *(one["provenance"]["machine"]["device"] for one in both)),
        ("system", *(one["provenance"]["machine"]["system"] for one in both)),
        ("backend", *(one["provenance"]["machine"]["backend"] for one in both)),
        *(
            (name, *(one["provenance"]["versions"].get(name, "-") for one in both))
            for name in first["provenance"]["versions"]
        ),
        ("time", *(one["time"] for one in both)),
        ("methods", *(", ".join(one["methods"]) for one in both)),
        ("held-out rows", *(_rows(one) for one in both)),
    ]
    return "\n\n".join(
        (
            _table(("set-up", "A", "B", ""), [(*row, _mark(row)) for row in setup]),
            _table(("measure", "A", "B", "B / A"), _measures(first, second)),
        )
    )


def _rows(result: Json) -> str:
    return str(sum(result["quality"]["n_rows"])) if result["quality"] else "-"


def _mark(row: Sequence[str]) -> str:
    return "" if row[1] == row[2] else "differs"


def _measures(first: Json, second: Json) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in [name for name in first["methods"] if name in second["methods"]]:
        found = [one["methods"][name] for one in (first, second)]
        rows_of = [[{**times, **memory} for times, memory in zip(one["contexts"], one["memory"])]
                   for one in found]  # fmt: skip
        for a, b in zip(*rows_of):
            about = f"{name}, {a['context']} tokens"
            for words, key, unit in (
                ("first token", "first_token_seconds", _ms),
                ("prompt tok/s", "prompt_tokens_per_second", _one),
                ("decode tok/s", "decode_tokens_per_second", _one),
                ("peak", "peak", _mb),
            ):
                rows.append(
                    (f"{about}: {words}", unit(a[key]), unit(b[key]), _ratio(a[key], b[key]))
                )
    both = first, second
    for kind in ("pack", "stock"):
        a, b = (one["switch"][kind]["seconds"] for one in both)
        rows.append((f"change of adapter, {kind}", _ms(a), _ms(b), _ratio(a, b)))
    if first["quality"] and second["quality"] and _rows(first) == _rows(second):
        a, b = (one["quality"]["device"]["pack"]["loss"] for one in both)
        rows.append(("loss of the pack", f"{a:.4f}", f"{b:.4f}", _ratio(a, b)))
        found = [_metrics(one["quality"]["device"]["pack"]) for one in both]
        rows += [(f"{name} of the pack", *pair, "") for name, *pair in zip(METRIC_NAMES, *found)]
    return rows


def _one(value: float) -> str:
    return f"{value:,.1f}"


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.2f}" if a else "-"
