"""The report of a run: Markdown, and one self-contained HTML file. Every number in it is read."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from d2c_mlx.evaluate.answers import METRIC_NAMES, METRICS, normalize_text
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.report import charts
from d2c_mlx.report.words import cost, refined
from d2c_mlx.utils.templates import percent, table, templates_of

__all__ = ["render_html", "render_markdown", "render_table"]

Json = dict[str, Any]


def render_markdown(artifacts: Mapping[str, Json]) -> str:
    """Render `report.md`.

    Args:
        artifacts: name -> JSON as the stages wrote it: losses, manifest (of the pack) and bench, or
            weights in place of losses and bench; clusters and merges, or plan; refines, if it was
            refined; and phone, if the phone benchmark ran.
    """
    context = _context(artifacts)
    context["phone_text"] = render_phone(context["phone"]) if context["phone"] else None
    return templates_of("d2c_mlx.report").get_template("report.md.jinja").render(context)


def render_html(artifacts: Mapping[str, Json]) -> str:
    """Render `report.html`: one file, no network. Arguments as `render_markdown`.

    A policy in its head allows its own script alone, so that no name or answer can be one.
    """
    context = _context(artifacts)
    if context["frontier"]:
        context["frontier_chart"] = charts.frontier_chart(context["frontier"])
    if len(context["rows"]) > len(("base", "individual", "pack")):
        context["bars"] = charts.excess_bars(context["rows"])
    if context["d2c"] and len(context["d2c"]["history"]) > 1:
        context["convergence"] = charts.convergence(context["d2c"]["history"])
    if context["phone"]:
        context["memory_bar"] = charts.memory_bar(context["phone"])
    folder = resources.files("d2c_mlx.report")
    script, style = (folder.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context |= {"script": script, "style": style, "script_hash": digest}
    context["examples"] = {
        name: _example(context["answers"].get(name, [])) for name, _ in context["worst"]
    }
    context["is_right"] = lambda a, b: normalize_text(a) == normalize_text(b)
    return templates_of("d2c_mlx.report").get_template("report.html.jinja").render(context)


def render_table(bench: Json) -> str:
    """The table of methods as Markdown: bytes, held-out loss, excess, retention.

    Without rows it has the tasks, and what their weights lost.

    Args:
        bench: content of `bench.json` or `weights.json`.
    """
    rows = _rows(bench)
    if not rows:
        tasks = sorted(bench["methods"]["pack"]["tasks"].items(), key=lambda kv: -kv[1]["error"])
        cells = [[name, percent(row["error"]), percent(row["kept"])] for name, row in tasks]
        return table(["task", "error of dW", "energy kept"], cells)
    cells = [
        [row["name"], f"{row['nbytes']:,}", percent(row["share"]), f"{row['loss']:.4f}",
         f"{row['excess']:.4f}", percent(row["retention"])]
        for row in rows
    ]  # fmt: skip
    return table(["method", "bytes", "of input", "loss", "excess", "retention"], cells)


def _context(artifacts: Mapping[str, Json]) -> Json:
    """What both templates show."""
    manifest, plan, measured = artifacts["manifest"], artifacts.get("plan"), "bench" in artifacts
    bench = artifacts["bench" if measured else "weights"]
    refines: Any = artifacts.get("refines", ())
    tasks, pack = bench["methods"]["pack"]["tasks"], bench["methods"]["pack"]
    lost = [
        row["error"] if not measured else 0 if row["retention"] is None else 1 - row["retention"]
        for row in tasks.values()
    ]
    key = "excess" if measured else "error"
    rows, total = _rows(bench), bench["methods"]["individual"]["nbytes"]
    share = pack["nbytes"] / total
    return {
        "measured": measured,
        "cost": cost(bench),
        "losses": artifacts["losses"] if measured else {"tasks": sorted(tasks), **bench},
        "d2c": None if plan else artifacts["clusters"]["methods"]["d2c"][0],
        "plan": plan,
        "refined": refined(refines, planned=bool(plan)),
        "stored": _stored(artifacts),
        "manifest": manifest,
        "rows": rows,
        "frontier": _frontier(plan, share, measured) if plan else None,
        "table": render_table(bench),
        "pack": pack,
        "share": share,
        "worst": sorted(tasks.items(), key=lambda kv: -kv[1][key]),
        # The whole bar. Without a loss worth a picture no bar is filled.
        "most_lost": max(0.01, *lost),
        "unpacked_nbytes": bench.get("unpacked_nbytes"),
        "methods": bench["methods"],
        "answers": bench.get("answers", {}),
        "metrics": bench.get("metrics", {}),
        "metric_names": dict(zip(METRICS, METRIC_NAMES)),
        "provenance": bench["provenance"],
        "phone": artifacts.get("phone"),
        "peaks": artifacts.get("peaks"),
    }  # fmt: skip


def _rows(bench: Json) -> list[Json]:
    """Methods sorted by excess loss, the strict measure, with the bare base model last.

    `d2c` is left out where the pack is the same merges, not refined ones.
    """
    methods = dict(bench["methods"])
    if methods.get("d2c") == methods["pack"]:
        del methods["d2c"]
    total = methods["individual"]["nbytes"]
    if "loss" not in methods["pack"]:
        return []
    order = sorted(methods, key=lambda name: (name == "base", methods[name]["excess"]))
    return [
        {"name": name, "share": methods[name]["nbytes"] / total, **methods[name]} for name in order
    ]


def _stored(artifacts: Mapping[str, Json]) -> list[Json]:
    """The adapters in the pack: number, tasks, share, and a colour where they are several."""
    plan = artifacts.get("plan")
    units: Any = plan["units"] if plan else artifacts["merges"]
    # Merges are all of one rank, or nearly.
    total = sum(unit["nbytes"] for unit in units) if plan else len(units)
    colours = itertools.cycle(charts.GROUP_COLOURS)
    result = []
    for number, unit in enumerate(units):
        tasks, part = (unit["tasks"], unit["nbytes"]) if plan else (unit["members"], 1)
        colour = next(colours) if len(tasks) > 1 else None
        shown = {"number": number, "tasks": tasks, "colour": colour, "part": part / total}
        result.append({**unit, **shown})
    return result


def _frontier(plan: Json, share: float, measured: bool) -> Json:
    """The budgets that a plan was made for, with the regret expected on calibration rows.

    Args:
        plan: content of `plan.json`.
        share: bytes of the pack over the adapters' 16-bit bytes.
        measured: False for a plan without rows, whose regrets are squared errors of dW.
    """
    what = "expected regret" if measured else "squared error of dW"
    stops = plan["frontier"]
    labels = {"own": "an adapter per task"}
    if all(row["merged"] is not None for row in stops):
        labels |= {"merged": "merged adapters only", "all": "the better of both"}
    names = [f"{100 * row['share']:.2f}%" for row in stops]
    return {
        "shares": [row["share"] for row in stops],
        "lines": {label: [row[key] for row in stops] for key, label in labels.items()},
        "unit": f"{what} on calibration rows" if measured else what,
        "pack": (share, plan["regret"]),
        "says": [
            f"{name} of the bytes, {what}: "
            + ", ".join(f"{row[key]:.4f} with {label}" for key, label in labels.items())
            for name, row in zip(names, stops)
        ],
        "header": ["budget", *labels.values()],
        "rows": [[name, *(f"{row[key]:.4f}" for key in labels)] for name, row in zip(names, stops)],
    }


def _example(rows: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
    """The first answer that the pack changes, else the first."""
    changed = (
        row for row in rows if normalize_text(row["pack"]) != normalize_text(row["individual"])
    )
    return next(changed, next(iter(rows), None))
