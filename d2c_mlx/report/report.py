"""The report of a run: Markdown, and one self-contained HTML file. Every number in it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2c_mlx.evaluate.metrics import METRIC_NAMES, METRICS
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.report import charts
from d2c_mlx.utils.templates import markdown, percent, templates_of

__all__ = ["render_html", "render_markdown", "render_table"]

Json = dict[str, Any]


def _rows(bench: Json) -> list[dict[str, Any]]:
    """Methods sorted by excess loss, the strict measure, with the bare base model last.

    `d2c` is left out where the pack is the same merges, not refined ones.
    """
    methods = dict(bench["methods"])
    if methods.get("d2c") == methods["pack"]:
        del methods["d2c"]
    total = methods["individual"]["nbytes"]
    order = sorted(methods, key=lambda name: (name == "base", methods[name]["excess"]))
    return [
        {"name": name, "share": methods[name]["nbytes"] / total, **methods[name]} for name in order
    ]


def render_table(bench: Json) -> str:
    """The table of methods as Markdown: bytes, held-out loss, excess, retention.

    Args:
        bench: content of `bench.json`.
    """
    lines = [
        "| method | bytes | of input | loss | excess | retention |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in _rows(bench):
        lines.append(
            f"| {markdown(row['name'])} | {row['nbytes']:,} | {percent(row['share'])} |"
            f" {row['loss']:.4f} | {row['excess']:.4f} | {percent(row['retention'])} |"
        )
    return "\n".join(lines)


def _context(artifacts: Mapping[str, Json]) -> Json:
    manifest, bench, plan = artifacts["manifest"], artifacts["bench"], artifacts.get("plan")
    d2c = None if plan else artifacts["clusters"]["methods"]["d2c"][0]
    lost = [1 - (one["retention"] or 1) for one in bench["methods"]["pack"]["tasks"].values()]
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
        # The whole bar. Without a loss worth a picture no bar is filled.
        "most_lost": max(0.01, *lost),
        "unpacked_nbytes": bench.get("unpacked_nbytes"),
        "methods": bench["methods"],
        "answers": bench.get("answers", {}),
        "metrics": bench.get("metrics", {}),
        "metric_names": dict(zip(METRICS, METRIC_NAMES)),
        "provenance": bench["provenance"],
        "phone": artifacts.get("phone"),
    }


def render_markdown(artifacts: Mapping[str, Json]) -> str:
    """Render `report.md`.

    Args:
        artifacts: name -> JSON as the stages wrote it: losses, manifest (of the pack) and bench;
            clusters and merges, or plan; and phone, if the phone benchmark ran.
    """
    context = _context(artifacts)
    context["phone_text"] = render_phone(context["phone"]) if context["phone"] else None
    return templates_of("d2c_mlx.report").get_template("report.md.jinja").render(context)


def render_html(artifacts: Mapping[str, Json]) -> str:
    """Render `report.html`: one file, no network, no script. Arguments as `render_markdown`."""
    context = _context(artifacts)
    if context["plan"]:
        context["frontier"] = charts.frontier(context["plan"], context["share"])
    else:
        # A planned run measures no merging method to compare with the pack.
        context["bars"] = charts.excess_bars(context["rows"])
        if len(context["d2c"]["history"]) > 1:
            context["convergence"] = charts.convergence(context["d2c"]["history"])
    if context["phone"]:
        context["memory_bar"] = charts.memory_bar(context["phone"])
    return templates_of("d2c_mlx.report").get_template("report.html.jinja").render(context)
