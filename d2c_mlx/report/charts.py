"""Charts as SVG, inline for the report or as files, in the text colour of their page.

matplotlib draws each chart once, for screen and paper; a chart engine in the page would take 800 kB
and more.
"""

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from d2c_mlx.utils.errors import printable

Json = Mapping[str, Any]
# Inline SVG replaces it by the page's own text colour, light or dark.
TEXT = "#7a7f87"
# Contrast of three to one or more on a white page and on a dark one, as those below.
_BLUE, _ORANGE, _GREEN, _GREY = COLOURS = ("#3b82c4", "#c9721a", "#4a9463", "#858c96")
# Of tasks that share an adapter; numbers tell groups apart beyond eight.
GROUP_COLOURS = (*COLOURS[:3], "#9467c8", "#cf4f4b", "#1f9292", "#c2559f", "#858220")
# Inches; 430 CSS pixels, so that text is hardly smaller on a phone.
_WIDTH = 4.5


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its axes in the style of all charts; sizes are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=TEXT, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(TEXT)
        label.set_fontsize(9)
    return figure, axes


def svg_file(figure: Any, description: str | None = None, salt: str = "d2c-mlx") -> str:  # noqa: ANN401
    """Text of an SVG file, with fixed ids and no date, so that equal results give equal files.

    Args:
        figure: a matplotlib figure.
        description: goes into the metadata.
        salt: makes ids differ between the charts of one page.
    """
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.hashsalt": salt, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, shown in the viewer's fonts, so a glyph missing here does not matter.
        # A font of this machine in its place would make the file differ between machines.
        for message in (r"(?s)Glyph \d+ .*missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message, UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05,
                       metadata={"Date": None, "Description": description})  # fmt: skip
    # A name may hold what XML does not allow.
    return printable(buffer.getvalue(), "\n\t")


def _svg(figure: Any, name: str) -> str:  # noqa: ANN401
    """Inline SVG, hidden from screen readers: the HTML figure around it describes it in words.

    `name` is that of the chart, unique in its page.
    """
    text = svg_file(figure, salt=name)
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # matplotlib numbers groups anew in every chart, and nothing refers to them.
    text = re.sub('<g id="[^"]*">', "<g>", text)
    # The page's own font, which it names once.
    text = re.sub(r'(<text style="[^"]*?) font-family: [^;"]*;', r"\1", text)
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


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
    return _svg(figure, "bars")


def frontier_chart(frontier: Json) -> str:
    """The loss of a plan against its bytes.

    Args:
        frontier: `shares` of the bytes at every budget, rising by a constant factor, and `lines`,
            label -> loss at each, in `unit`, where task adapters lose 0 and the base model 1;
            `pack`, its share and loss.
    """
    figure, axes = new_figure(_WIDTH, 3.4)
    lines, (share, loss) = frontier["lines"], frontier["pack"]
    shares = [100 * part for part in frontier["shares"]]
    styles = (("--o", _GREEN), (":o", _GREY), ("-o", _BLUE))
    for (label, values), (style, colour) in zip(lines.items(), styles):
        axes.plot(shares, values, style, label=label, markersize=4, color=colour)
    axes.plot(100 * share, loss, "*", markersize=13, color=_ORANGE, label="pack")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{x:.3g}" for x in shares], rotation=60)
    axes.minorticks_off()
    axes.set_xlim(shares[0] / 1.2, shares[-1] * 1.2)
    for limit in (0, 1):
        axes.axhline(limit, color=TEXT, linewidth=0.8)
    # Linear around 0: a pack may be better than the task adapters.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0, task adapters", "0.01", "0.1", "1, base model"])
    lowest = min(loss, *(min(values) for values in lines.values()))
    axes.set_ylim(2 * min(-0.001, lowest), 2)
    axes.set_xlabel("% of the adapters' 16-bit bytes")
    axes.set_ylabel(frontier["unit"])
    figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=2, loc="outside upper left")
    return _svg(figure, "frontier")


def memory_chart(phone: Json) -> str:
    """Held-out loss by peak memory, with lines for devices that refuse a pack; has `quality`."""
    figure, axes = new_figure(_WIDTH, 3.8)
    packs = dict.fromkeys(row["pack"] for row in phone["sweep"])
    markers = dict(zip(packs, itertools.cycle("osD^v*PX<>")))
    colours = dict(zip(phone["bases"], itertools.cycle(GROUP_COLOURS)))
    context, largest = phone["contexts"][-1], 0.0
    for row in phone["sweep"]:
        bits, pack, peak = row["bits"], row["pack"], row["peak"] / 1e6
        if row["context"] == context and row["kv_bits"] == 16 and row["resident"] <= 1:
            loss, largest = phone["quality"][bits][pack]["loss"], max(largest, peak)
            axes.plot(peak, loss, markers[pack], color=colours[bits], markersize=6)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=f"{name} bit")
    for name, marker in markers.items():
        axes.plot([], [], marker, color=_GREY, label=name.replace("$", r"\$"))  # no formula
    label = f"peak at {context:,} tokens, MB"
    style = {"rotation": 90, "ha": "right", "va": "top", "size": 8, "color": TEXT, "parse_math": 0}
    for name, device in sorted(phone["devices"].items(), key=lambda item: item[1]["memory"]):
        limit = device["memory"] / 1e6
        if limit >= largest:
            label += f"\nAll fit from {limit:,.0f} MB on ({name})"
            break
        axes.axvline(limit, color=TEXT, linewidth=0.8, linestyle=":")
        axes.annotate(name, (limit, 1), xycoords=("data", "axes fraction"), **style)
    axes.set_yscale("log")
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.set_xlabel(label, parse_math=False)
    axes.set_ylabel("held-out loss")
    figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=3, loc="outside upper left")
    return _svg(figure, "memory")
