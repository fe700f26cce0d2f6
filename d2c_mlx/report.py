"""Results -> Markdown and one self-contained HTML file. Computes nothing; every number is read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

__all__ = ["render_html", "render_markdown", "render_table"]

Json = dict[str, Any]


def _rows(bench: Json) -> list[dict[str, Any]]:
    """Methods sorted by excess loss, the strict measure; the bare base model last."""
    methods = bench["methods"]
    total = methods["individual"]["nbytes"]
    order = sorted(methods, key=lambda name: (name == "base", methods[name]["excess"]))
    return [
        {"name": name, "share": methods[name]["nbytes"] / total, **methods[name]} for name in order
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def render_table(bench: Json) -> str:
    """The table of methods as Markdown: bytes, held-out loss, excess, retention."""
    lines = [
        "| method | bytes | of input | loss | excess | retention |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in _rows(bench):
        lines.append(
            f"| {row['name']} | {row['nbytes']:,} | {_percent(row['share'])} | {row['loss']:.4f} |"
            f" {row['excess']:.4f} | {_percent(row['retention'])} |"
        )
    return "\n".join(lines)


def _environment() -> Any:  # noqa: ANN401  jinja2 is imported late
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("d2c_mlx", "."),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment


def _context(artifacts: Mapping[str, Json]) -> Json:
    manifest, bench, plan = artifacts["manifest"], artifacts["bench"], artifacts.get("plan")
    d2c = None if plan else artifacts["clusters"]["methods"]["d2c"][0]
    worst = sorted(bench["methods"]["pack"]["tasks"].items(), key=lambda kv: -kv[1]["excess"])
    return {
        "losses": artifacts["losses"],
        "d2c": d2c,
        "merges": artifacts.get("merges"),
        "plan": plan,
        "n_stored": len(plan["units"] if plan else artifacts["merges"]),
        "manifest": manifest,
        "rows": _rows(bench),
        "table": render_table(bench),
        "pack": bench["methods"]["pack"],
        "share": bench["methods"]["pack"]["nbytes"] / bench["methods"]["individual"]["nbytes"],
        "worst": worst,
        "methods": bench["methods"],
        "provenance": bench["provenance"],
    }


def render_markdown(artifacts: Mapping[str, Json]) -> str:
    """`report.md`.

    Args:
        artifacts: losses, manifest (of the pack) and bench, and either clusters and merges or plan,
            as the stages wrote them.
    """
    return _environment().get_template("report.md.jinja").render(_context(artifacts))


def render_html(artifacts: Mapping[str, Json]) -> str:
    """`report.html`: one file, no network, no script. Arguments as `render_markdown`."""
    context = _context(artifacts)
    context["bars"] = _excess_bars(context["rows"])
    if context["plan"]:
        context["frontier"] = _frontier(context["plan"], context["share"])
    context["heatmap"] = _heatmap(context["losses"], _labels(context))
    return _environment().get_template("report.html.jinja").render(context)


def _labels(context: Json) -> list[int]:
    """Tasks that share an adapter have one label."""
    if context["d2c"]:
        return context["d2c"]["labels"]
    groups = [unit["tasks"] for unit in context["plan"]["units"]]
    groups += [[name] for name in context["plan"]["base"]]
    label = {name: k for k, names in enumerate(groups) for name in names}
    return [label[name] for name in context["losses"]["tasks"]]


def _svg(figure: Any) -> str:  # noqa: ANN401  a matplotlib figure
    """Inline SVG; fixed ids and no date, so that equal results give equal files."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "d2c-mlx", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    # One grey that reads on both a light and a dark page.
    axes.tick_params(colors="#7a7f87", labelsize=9)
    for spine in axes.spines.values():
        spine.set_color("#7a7f87")
    axes.xaxis.label.set_color("#7a7f87")
    axes.title.set_color("#7a7f87")
    return figure, axes


def _excess_bars(rows: list[dict[str, Any]]) -> str:
    figure, axes = _figure(6.4, 0.4 * len(rows) + 0.8)
    shown = [row for row in rows if row["name"] != "base"]
    bars = axes.barh(
        [row["name"] for row in shown], [row["excess"] for row in shown], color="#3b82c4"
    )
    axes.bar_label(bars, [f"{row['excess']:.3f}" for row in shown], padding=3, color="#7a7f87")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("excess loss over individual adapters (nats per target token)")
    return _svg(figure)


def _frontier(plan: Json, share: float) -> str:
    figure, axes = _figure(6.4, 3.6)
    shares = [100 * row["share"] for row in plan["frontier"]]
    lines = (
        ("all", "both", "-o"),
        ("own", "own adapters only", "--"),
        ("merged", "merges only", ":"),
    )
    for name, label, style in lines:
        axes.plot(shares, [row[name] for row in plan["frontier"]], style, label=label, markersize=3)
    axes.plot(100 * share, plan["regret"], "*", markersize=13, color="#d9822b", label="the pack")
    for limit, label in ((1, "base model"), (0, "individual adapters")):
        axes.axhline(limit, color="#7a7f87", linewidth=0.8)
        axes.annotate(label, (shares[-1], limit), (0, 3), textcoords="offset points", ha="right",
                      fontsize=8, color="#7a7f87")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{x:.3g}" for x in shares])
    axes.minorticks_off()
    # Linear around 0, which a plan may beat.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes.set_xlabel("% of the adapters' 16-bit bytes")
    axes.set_ylabel("normalised regret on the probes", color="#7a7f87")
    axes.legend(frameon=False, fontsize=8, labelcolor="#7a7f87")
    return _svg(figure)


def _heatmap(losses: Json, labels: list[int]) -> str:
    import numpy as np

    order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    values = np.array(losses["values"])[np.ix_(order, order)]
    size = max(4.5, 0.28 * len(order) + 1.8)
    figure, axes = _figure(size, size)
    image = axes.imshow(values, cmap="viridis_r")
    axes.set_xticks(range(len(order)), [losses["adapters"][i] for i in order], rotation=90)
    axes.set_yticks(range(len(order)), [losses["tasks"][i] for i in order])
    axes.set_xlabel("adapter")
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.ax.tick_params(colors="#7a7f87", labelsize=9)
    for edge in np.flatnonzero(np.diff([labels[i] for i in order])) + 0.5:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    return _svg(figure)
