"""Charts in the text colour of the page that they are on: inline SVG for the report, and files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import east_asian_width

__all__ = [
    "COLOURS", "TEXT", "convergence", "excess_bars", "frontier", "heatmap", "memory_bar",
    "new_figure", "svg_file",
]  # fmt: skip

Json = Mapping[str, Any]
# Inline it becomes the page's own text colour, light or dark.
TEXT = "#7a7f87"
# Three to one or more against a white page and a dark one.
_BLUE, _ORANGE, _GREEN, _GREY = COLOURS = ("#3b82c4", "#c9721a", "#4a9463", "#858c96")
# How to write what carries a name: "a$^$" would be a formula, and a wrong one is an error.
_NAMES: dict[str, Any] = {"parse_math": False}
# Letters of a name; more would leave no room for the chart beside them.
_LONGEST = 28
# Inches; 430 CSS pixels, so that text is hardly smaller on a phone.
_WIDTH = 4.5


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, in the style of all charts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=TEXT, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(TEXT)
        label.set_fontsize(9)
    return figure, axes


def svg_file(figure: Any, description: str | None = None) -> str:  # noqa: ANN401  of matplotlib
    """An SVG file; fixed ids and no date, so that equal results give equal files."""
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.hashsalt": "d2c-mlx", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, and whoever shows the file has fonts of their own. One of this machine's
        # in its place would make other files elsewhere.
        for message in (r"(?s)Glyph \d+ .*missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message, UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05,
                       metadata={"Date": None, "Description": description})  # fmt: skip
    return buffer.getvalue()


def _svg(figure: Any) -> str:  # noqa: ANN401  a matplotlib figure
    """Inline SVG. The figure around it has the words, so a screen reader passes over its shapes."""
    text = svg_file(figure)
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _short(name: str) -> str:
    """A name that leaves room for the chart, without its middle if it is long."""
    is_wide = any(east_asian_width(letter) in "WF" for letter in name)
    most = _LONGEST // 2 if is_wide else _LONGEST
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def excess_bars(rows: Sequence[Json]) -> str:
    """Excess loss of every method but the base."""
    figure, axes = new_figure(_WIDTH, 0.34 * len(rows) + 0.7)
    shown = [row for row in rows if row["name"] != "base"]
    colours = [_ORANGE if row["name"] == "pack" else _BLUE for row in shown]
    names, values = [row["name"] for row in shown], [row["excess"] for row in shown]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [f"{value:.4f}" for value in values], padding=3, color=TEXT, fontsize=9)
    axes.margins(x=0.25)
    axes.locator_params(axis="x", nbins=5)
    axes.invert_yaxis()
    axes.set_xlabel("excess loss (nats per target token)")
    return _svg(figure)


def convergence(history: Sequence[Json]) -> str:
    """Objective of D2C by round."""
    figure, axes = new_figure(_WIDTH, 2.4)
    values = [entry["objective"] for entry in history]
    axes.plot(range(len(values)), values, "-o", color=_BLUE, markersize=4)
    axes.set_ylim(bottom=min(0, *values))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("normalised regret")
    return _svg(figure)


def frontier(plan: Json, share: float) -> str:
    """Regret against bytes for each family, and the pack."""
    figure, axes = new_figure(_WIDTH, 3.4)
    shares = [100 * row["share"] for row in plan["frontier"]]
    lines = (
        ("all", "both", "-o", _BLUE),
        ("own", "own adapters only", "--", _GREEN),
        ("merged", "merges only", ":", _GREY),
    )
    for name, label, style, colour in lines:
        values = [row[name] for row in plan["frontier"]]
        if None in values:
            continue  # no merge was measured
        axes.plot(shares, values, style, label=label, markersize=3, color=colour)
    axes.plot(100 * share, plan["regret"], "*", markersize=13, color=_ORANGE, label="the pack")
    for limit, label in ((1, "base model"), (0, "individual adapters")):
        axes.axhline(limit, color=TEXT, linewidth=0.8)
        # The legend is at the upper right, lines that beat 0 go down to the right.
        x, side = (shares[-1], "right") if limit == 0 else (shares[0], "left")
        axes.annotate(label, (x, limit), (0, 3), textcoords="offset points", fontsize=8,
                      color=TEXT, ha=side)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{x:.2g}" for x in shares], rotation=60)
    axes.minorticks_off()
    # Linear around 0, which a plan may beat.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes.set_ylim(bottom=2 * min(-0.001, *(row["all"] for row in plan["frontier"])))
    axes.set_xlabel("% of the adapters' 16-bit bytes")
    axes.set_ylabel("expected regret on the probes")
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return _svg(figure)


def heatmap(losses: Json, labels: Sequence[int]) -> str:
    """Probe losses, tasks by adapters, in the order of their clusters with lines between them.

    What was not measured stays blank.
    """
    import numpy as np

    order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    values = np.array(losses["values"], float)[np.ix_(order, order)]
    size = max(_WIDTH, 0.28 * len(order) + 1.8)
    figure, axes = new_figure(size, size)
    # One pixel per loss: as an image of the figure's size, 200 tasks would take a minute and 1 GB.
    image = axes.imshow(values, cmap="viridis_r", interpolation="none")
    adapters, tasks = ([_short(losses[key][i]) for i in order] for key in ("adapters", "tasks"))
    axes.set_xticks(range(len(order)), adapters, rotation=90, **_NAMES)
    axes.set_yticks(range(len(order)), tasks, **_NAMES)
    axes.set_xlabel("adapter")
    axes.set_ylabel("task")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    bar.ax.tick_params(colors=TEXT, labelsize=9)
    bar.outline.set_edgecolor(TEXT)
    for edge in np.flatnonzero(np.diff([labels[i] for i in order])) + 0.5:
        axes.axhline(edge, color="white", linewidth=2)
        axes.axvline(edge, color="white", linewidth=2)
    return _svg(figure)


def memory_bar(phone: Json) -> str:
    """Memory by component at the longest context of every method, against the device's limit."""
    methods = phone["methods"]
    figure, axes = new_figure(_WIDTH, 0.36 * len(methods) + 1.1)
    rows = [max(one["memory"], key=lambda m: m["context"]) for one in methods.values()]
    parts = (("weights", _BLUE), ("adapter", _ORANGE), ("kv_cache", _GREEN), ("rest", _GREY))
    left = [0.0] * len(rows)
    for key, colour in parts:
        widths = [row[key] / 1e6 for row in rows]
        label = {"kv_cache": "KV cache"}.get(key, key)
        axes.barh(list(methods), widths, left=left, color=colour, label=label)
        left = [x + width for x, width in zip(left, widths)]
    limit = phone["device"]["memory"] / 1e6
    axes.axvline(
        limit, color=TEXT, linestyle="--", label=f"limit of {_short(phone['device']['name'])}"
    )
    axes.set_xlim(0, 1.02 * max(limit, *left))
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    legend = figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=3,
                           loc="outside upper left")  # fmt: skip
    for text in legend.get_texts():
        text.set(**_NAMES)
    return _svg(figure)
