"""The report of a run: Markdown, and one self-contained HTML file. Every number in it is read."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from d2c_mlx.evaluate.metrics import METRIC_NAMES, METRICS, normalize_text
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.report import charts
from d2c_mlx.report.frontier import planned_frontier, slots_frontier
from d2c_mlx.report.words import OWN_ANSWERS, excess_interval, refined, unmeasured
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
    if "loss" not in methods["pack"]:
        return []
    order = sorted(methods, key=lambda name: (name == "base", methods[name]["excess"]))
    return [
        {"name": name, "share": methods[name]["nbytes"] / total, **methods[name]} for name in order
    ]


def render_table(bench: Json) -> str:
    """The table of methods as Markdown: bytes, held-out loss, excess, retention.

    Without rows it has the tasks, and what their weights lost.

    Args:
        bench: content of `bench.json` or `weights.json`.
    """
    rows = _rows(bench)
    if not rows:
        tasks = sorted(bench["methods"]["pack"]["tasks"].items(), key=lambda kv: -kv[1]["error"])
        lines = ["| task | error of dW | energy kept |", "|---|--:|--:|"]
        lines += [f"| {markdown(name)} | {percent(one['error'])} | {percent(one['kept'])} |"
                  for name, one in tasks]  # fmt: skip
        return "\n".join(lines)
    lines = [
        "| method | bytes | of input | loss | excess | retention |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {markdown(row['name'])} | {row['nbytes']:,} | {percent(row['share'])} |"
            f" {row['loss']:.4f} | {row['excess']:.4f} | {percent(row['retention'])} |"
        )
    return "\n".join(lines)


def _context(artifacts: Mapping[str, Json]) -> Json:
    manifest, plan, measured = artifacts["manifest"], artifacts.get("plan"), "bench" in artifacts
    bench = artifacts["bench" if measured else "weights"]
    refines: Any = artifacts.get("refines", ())
    d2c = None if plan else artifacts["clusters"]["methods"]["d2c"][0]
    of = bench["methods"]["pack"]["tasks"]
    lost = [
        one["error"] if not measured else 0 if one["retention"] is None else 1 - one["retention"]
        for one in of.values()
    ]
    worst = sorted(of.items(), key=lambda kv: -kv[1]["excess" if measured else "error"])
    rows, total = _rows(bench), bench["methods"]["individual"]["nbytes"]
    slots = slots_frontier(rows)
    share, asked = (
        (nbytes or 0) / total
        for nbytes in (bench["methods"]["pack"]["nbytes"], bench["provenance"]["budget"]["nbytes"])
    )
    return {
        "measured": measured,
        "said": OWN_ANSWERS if measured else unmeasured(bench),
        "losses": artifacts["losses"] if measured else {"tasks": sorted(of), **bench},
        "d2c": d2c,
        "plan": plan,
        "refined": refined(refines, planned=bool(plan)),
        "stored": _stored(artifacts),
        "manifest": manifest,
        "rows": rows,
        "frontier": planned_frontier(plan, share, asked, measured) if plan else slots,
        "table": render_table(bench),
        "pack": bench["methods"]["pack"],
        "interval": excess_interval(bench),
        "share": share,
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
        "peaks": artifacts.get("peaks"),
    }


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
    context |= _alike(context)
    script, style = (_text(f"report.{kind}") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context |= {"script": script, "style": style, "script_hash": digest}
    context["examples"] = {
        name: _example(context["answers"].get(name, [])) for name, _ in context["worst"]
    }
    context["is_right"] = lambda a, b: normalize_text(a) == normalize_text(b)
    return templates_of("d2c_mlx.report").get_template("report.html.jinja").render(context)


def _alike(context: Json) -> Json:
    """The tree of the adapters and the heatmap of their cosines, where there are several."""
    names, cosines = context["losses"]["tasks"], context["losses"].get("similarity")
    if not cosines or len(names) == 1:
        return {}
    stored, labels = context["stored"], _labels(context)
    colours = {one["number"]: one["colour"] for one in stored if one["colour"]}
    # An adapter's cosine with itself would leave no colour for the others.
    most = max(x for i, row in enumerate(cosines) for x in row[:i] + row[i + 1 :])
    shares = [[x / max(most, 1e-9) for x in row] for row in cosines]
    return {
        "tree": charts.dendrogram(names, cosines, labels, colours),
        "cosines": _heat(shares, labels),
    }


def _text(name: str) -> str:
    return resources.files("d2c_mlx.report").joinpath(name).read_text("utf-8")


def _stored(artifacts: Mapping[str, Json]) -> list[Json]:
    """The adapters in the pack: number, tasks, colour where they are several, and what is known."""
    plan = artifacts.get("plan")
    found: Any = plan["units"] if plan else artifacts["merges"]
    # Merges are all of one rank, or nearly.
    total = sum(one["nbytes"] for one in found) if plan else len(found)
    colours = itertools.cycle(charts.GROUP_COLOURS)
    result = []
    for number, one in enumerate(found):
        tasks, part = (one["tasks"], one["nbytes"]) if plan else (one["members"], 1)
        colour = next(colours) if len(tasks) > 1 else None
        known = {"number": number, "tasks": tasks, "colour": colour, "part": part / total}
        result.append({**one, **known})
    return result


def _example(rows: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
    """The first answer that the pack changes, else the first."""
    changed = (
        one for one in rows if normalize_text(one["pack"]) != normalize_text(one["individual"])
    )
    return next(changed, next(iter(rows), None))


def _heat(shares: Sequence[Sequence[float]], labels: Sequence[int]) -> Json:
    """A heatmap's order, by stored adapter, where another one begins, and shades from 0 to 100."""
    order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    shades = [[round(100 * min(max(x, 0), 1)) for x in row] for row in shares]
    shared = len(set(labels)) < len(labels)
    edges = {b for a, b in zip(order, order[1:]) if shared and labels[a] != labels[b]}
    return {"order": order, "shades": shades, "edges": edges}


def _labels(context: Json) -> list[int]:
    """A label per task, equal for tasks that share an adapter."""
    groups = [one["tasks"] for one in context["stored"]]
    if context["plan"]:
        groups += [[name] for name in context["plan"]["base"]]
    label = {name: k for k, names in enumerate(groups) for name in names}
    return [label[name] for name in context["losses"]["tasks"]]
