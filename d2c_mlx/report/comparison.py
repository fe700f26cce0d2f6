"""A comparison of runs as Markdown, CSV and a plot. Every number in it is read."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from d2c_mlx.report.charts import COLOURS, TEXT, new_figure, svg_file
from d2c_mlx.utils.templates import markdown, percent

__all__ = ["render_csv", "render_plot", "render_runs"]

Json = Mapping[str, Any]
_COLUMNS = (
    "config", "budget", "clusters", "method", "nbytes", "loss", "excess", "retention", "beside",
    "difference", "low", "high", "p", "name"
)  # fmt: skip


def _place(row: Json) -> tuple[str, str, str]:
    return row["config"], row["budget"], row["clusters"]


def _rows(content: Json) -> list[dict[str, Any]]:
    """Runs by config, budget and clusters, best first, each beside the first method there."""
    pairs: dict[tuple[str, ...], dict[str, Any]] = {}
    for pair in content["pairs"]:
        pairs.setdefault((*_place(pair), pair["ours"]), {**pair, "beside": pair["theirs"]})
    order = list(dict.fromkeys(map(_place, content["runs"])))
    rows = [{**pairs.get((*_place(run), run["method"]), {}), **run} for run in content["runs"]]
    return sorted(rows, key=lambda row: (order.index(_place(row)), row["excess"]))


def render_runs(content: Json) -> str:
    """The table of a comparison as Markdown.

    Args:
        content: content of `compare.json`.
    """
    rows = _rows(content)
    named = any(row["config"] for row in rows)
    head = ["budget", "clusters", "method", "bytes", "loss", "excess", "kept"]
    head = (["config"] if named else []) + head + ["beside the first method"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * (3 + named) + "--:|" * 5]
    for row in rows:
        cells = [row["config"]] if named else []
        cells += [row["budget"], row["clusters"], row["method"], f"{row['nbytes']:,}"]
        cells += [f"{row['loss']:.4f}", f"{row['excess']:.4f}", percent(row["retention"])]
        beside = ""
        if "beside" in row:
            # An interval needs two rows of every task.
            missing = row["low"] is None
            between = "too few rows" if missing else f"{row['low']:+.4f} to {row['high']:+.4f}"
            beside = f"{row['difference']:+.4f} ({between})"
        lines.append(f"| {' | '.join([*map(markdown, cells), beside])} |")
    lines += [
        "",
        "Excess: nats per target token above the individual adapters, on held-out rows. Beside the"
        " first method: the loss less the one of the method that was named first, with its 95 %"
        " interval by a paired bootstrap over the rows; below 0 is better.",
    ]
    return "\n".join(lines) + "\n"


def render_csv(content: Json) -> str:
    """The table of a comparison as CSV, with all digits. Arguments as `render_runs`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(content))
    return out.getvalue()


def render_plot(content: Json) -> str:
    """Excess of every run as an SVG file, with the interval of its difference to the first method.

    Arguments as `render_runs`.
    """
    rows = _rows(content)
    methods = list(dict.fromkeys(run["method"] for run in content["runs"]))
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(" ".join(filter(None, _place(row))), []).append(row)
    figure, axes = new_figure(6, 0.6 + 0.3 * len(methods) + 0.2 * len(rows))
    step = 0.8 / len(series)
    for k, (label, points) in enumerate(series.items()):
        y = [methods.index(row["method"]) + step * (k - (len(series) - 1) / 2) for row in points]
        bars: list[list[float]] = [[], []]
        for row in points:
            measured = row.get("low") is not None
            # Resampled ratios of few rows can all lie on one side of the ratio itself.
            bars[0].append(max(0.0, row["difference"] - row["low"]) if measured else 0.0)
            bars[1].append(max(0.0, row["high"] - row["difference"]) if measured else 0.0)
        marker, colour = "osD^v"[k // len(COLOURS) % 5], COLOURS[k % len(COLOURS)]
        x = [row["excess"] for row in points]
        axes.errorbar(x, y, xerr=bars, fmt=marker, color=colour, capsize=2, label=label)
    axes.set_yticks(range(len(methods)), methods, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("excess, nats per target token")
    axes.legend(fontsize=8, labelcolor=TEXT, frameon=False, loc="best")
    return svg_file(figure, "Excess of every method; bars are 95 % of its difference to the first")
