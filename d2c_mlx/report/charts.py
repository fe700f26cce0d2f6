"""Charts as SVG, inline for the report or as files, in the text colour of their page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import east_asian_width

from d2c_mlx.utils.errors import printable

__all__ = [
    "COLOURS", "TEXT", "convergence", "excess_bars", "frontier", "heatmap", "memory_bar",
    "new_figure", "svg_file",
]  # fmt: skip

Json = Mapping[str, Any]
# Inline SVG replaces it by the page's own text colour, light or dark.
TEXT = "#7a7f87"
# Contrast of three to one or more on a white page and on a dark one.
_BLUE, _ORANGE, _GREEN, _GREY = COLOURS = ("#3b82c4", "#c9721a", "#4a9463", "#858c96")
# Text settings for names: "a$^$" would be parsed as a formula, and a wrong one is an error.
_NAMES: dict[str, Any] = {"parse_math": False}
# Most letters of a name; more would leave no room for the chart.
_LONGEST = 28
# Inches; 430 CSS pixels, so that text is hardly smaller on a phone.
_WIDTH = 4.5


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its axes in the style of all charts; sizes are in inches."""
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
    """Text of an SVG file, with fixed ids and no date, so that equal results give equal files.

    Args:
        figure: a matplotlib figure.
        description: goes into the metadata.
    """
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.hashsalt": "d2c-mlx", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, shown in the viewer's fonts, so a glyph missing here does not matter.
        # A font of this machine in its place would make the file differ between machines.
        for message in (r"(?s)Glyph \d+ .*missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message, UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05,
                       metadata={"Date": None, "Description": description})  # fmt: skip
    # A name may hold what XML does not allow.
    return printable(buffer.getvalue(), "\n\t")


def _svg(figure: Any) -> str:  # noqa: ANN401  a matplotlib figure
    """Inline SVG, hidden from screen readers: the HTML figure around it describes it in words."""
    text = svg_file(figure)
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _short(name: str) -> str:
    """The name, without its middle if it is too long for a chart."""
    is_wide = any(east_asian_width(letter) in "WF" for letter in name)
    most = _LONGEST // 2 if is_wide else _LONGEST
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def excess_bars(rows: Sequence[Json]) -> str:
    """Bars of the excess loss (nats per target token) of every method except the base model."""
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
    """The objective of D2C, normalised regret, by round."""
    figure, axes = new_figure(_WIDTH, 2.4)
    values = [entry["objective"] for entry in history]
    axes.plot(range(len(values)), values, "-o", color=_BLUE, markersize=4)
    axes.set_ylim(bottom=min(0, *values))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("normalised regret")
    return _svg(figure)


def frontier(plan: Json, share: float) -> str:
    """Regret against bytes for each family of candidates, and for the pack.

    Args:
        plan: content of `plan.json`.
        share: bytes of the pack over the adapters' 16-bit bytes.
    """
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
    # Linear around 0: a plan may be better than the individual adapters.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes.set_ylim(bottom=2 * min(-0.001, *(row["all"] for row in plan["frontier"])))
    axes.set_xlabel("% of the adapters' 16-bit bytes")
    axes.set_ylabel("expected regret on the probes")
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return _svg(figure)


def heatmap(losses: Json, labels: Sequence[int]) -> str:
    """Losses on the calibration rows, tasks by adapters, ordered and ruled by cluster.

    Pairs that were not measured stay blank.

    Args:
        losses: content of `losses.json`.
        labels: number of the cluster of each task.
    """
    import numpy as np

    order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    values = np.array(losses["values"], float)[np.ix_(order, order)]
    size = max(_WIDTH, 0.28 * len(order) + 1.8)
    figure, axes = new_figure(size, size)
    # One pixel per loss: an image of the figure's size takes a minute and 1 GB for 200 tasks.
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
    """Memory by component of every method at its longest context, against the device's limit."""
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
