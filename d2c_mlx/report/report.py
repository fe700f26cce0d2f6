"""The result of a run for people: in words, and as one self-contained HTML file."""

import itertools
import math
import shlex
from collections.abc import Mapping
from importlib import resources
from typing import Any

from d2c_mlx.evaluate.heldout import same_text
from d2c_mlx.report import charts
from d2c_mlx.utils.environment import program
from d2c_mlx.utils.templates import percent, size, table, templates_of

Json = dict[str, Any]
_OWN_ANSWERS = (
    " These rows are the adapters' own answers to your prompts, and no held-out rows of yours: a"
    " loss says how far the pack is from the adapters, not from the truth."
)
# A wider interval, as a share of what the adapters gain, cannot tell packs apart that are alike.
_WIDE = 0.01
# With fewer answers the interval is wider than a fifth.
_FEW_ANSWERS = 100


def render_html(artifacts: Mapping[str, Json]) -> str:
    """Render `report.html`: one file, no network; a policy in its head allows no script.

    Args:
        artifacts: name -> JSON as the stages wrote it: losses, manifest (of the pack) and bench, or
            weights in place of losses and bench; clusters and merges, or plan; refines, if it was
            refined; and phone, if the phone benchmark ran.
    """
    context = _context(artifacts)
    if context["frontier"]:
        context["frontier_chart"] = charts.frontier_chart(context["frontier"])
    if len(context["rows"]) > len(("base", "individual", "pack")):
        context["bars"] = charts.excess_bars(context["rows"])
    if context["phone"] and context["phone"]["quality"]:
        context["memory_chart"] = charts.memory_chart(context["phone"])
    style = resources.files("d2c_mlx.report").joinpath("report.css")
    context["style"] = style.read_text("utf-8")
    context["examples"] = {}
    for name, _ in context["worst"]:
        rows = context["answers"].get(name, [])
        changed = (row for row in rows if not same_text(row["pack"], row["individual"]))
        context["examples"][name] = next(changed, next(iter(rows), None))
    context["is_right"] = same_text
    return templates_of("d2c_mlx.report").get_template("report.html.jinja").render(context)


def render_table(bench: Json) -> str:
    """The table of methods as Markdown: bytes, held-out loss, excess, kept.

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
         f"{row['excess']:.4f}", percent(row["kept"])]
        for row in rows
    ]  # fmt: skip
    return table(["method", "bytes", "of input", "loss", "excess", "kept"], cells)


def verdict(bench: Json) -> str:
    """What came out, what it costs, and the worst task, in some sentences.

    Args:
        bench: content of `bench.json`, or of `weights.json` where there are no rows.
    """
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    n, total = len(pack["tasks"]), size(inputs["nbytes"])
    start = f"{n} adapters, {total} in all, take" if n > 1 else f"1 adapter, {total}, takes"
    text = f"{start} {size(pack['nbytes'])} ({percent(pack['nbytes'] / inputs['nbytes'])})"
    unpacked = bench.get("unpacked_nbytes", pack["nbytes"])
    if unpacked != pack["nbytes"]:
        text += f", unpacked for other programs {size(unpacked)}"
    return f"{text}. {_cost(bench)}"


def _cost(bench: Json) -> str:
    """What a pack costs on held-out rows, or what only its weights can tell; and the worst task.

    Args:
        bench: content of `bench.json` or `weights.json`.
    """
    pack = bench["methods"]["pack"]
    if "loss" not in pack:
        name, worst = min(pack["tasks"].items(), key=lambda item: item[1]["kept"])
        return (
            f"By weights, {percent(pack['kept'])} of what the adapters change is kept; the worst is"
            f" {name}, {percent(worst['kept'])} kept. Whether the tasks still work is unknown, as"
            " there are no rows and no loss was measured: d2c-mlx run --tasks DIR measures it."
        )
    nats = "nothing: " if pack["excess"] <= 0 else ""
    used, given = sum(map(len, bench["rows"].values())), bench["n_held_out"]
    rows = f"{used} of {given}" if used < given else f"all {used}"
    text = f"On {rows} held-out rows that costs {nats}{pack['excess']:.4f} nats per target token"
    low, high = bench["interval"]["low"], bench["interval"]["high"]
    if low is None:
        text += " (no interval: a task has one held-out row only)"
    else:
        few = high - low > _WIDE * abs(bench["methods"]["base"]["excess"])
        text += f" (95% interval {low:.4f} to {high:.4f}"
        text += ": too few rows to tell more)" if few else ")"
    if pack["kept"] is not None:
        text += f"; {percent(pack['kept'])} of what the adapters gain is kept"
    name, worst = max(pack["tasks"].items(), key=lambda item: item[1]["excess"])
    kept = "" if worst["kept"] is None else f", {percent(worst['kept'])} kept"
    text += f". The worst task is {name}: {worst['excess']:.4f} nats{kept}.{_beside(bench)}"
    return text if bench["provenance"]["config"]["tasks"] else text + _OWN_ANSWERS


def _beside(bench: Json) -> str:
    """Which won, the pack or its best rival; and a plan that would be smaller and keep more."""
    text, rivals = "", bench.get("rivals", {})
    if rivals:
        name, pair = max(rivals.items(), key=lambda item: item[1]["difference"])
        sure = pair["low"] is not None and pair["low"] * pair["high"] > 0
        side = "ahead of" if pair["difference"] <= 0 else "behind"
        text = f" The pack is {side} {name}, its best rival, by {abs(pair['difference']):.4f} nats"
        text += "." if sure else ", which these rows are too few to tell."
        if pair["difference"] == pair["low"] == pair["high"] == 0:  # in every row
            text = f" The best rival, {name}, chose the same clusters."
    if plan := bench.get("plan"):
        kept = percent(plan["kept"])
        text += f" --budget {plan['budget']} would be smaller, and keep {kept} by an estimate."
    return text


def answered(bench: Json) -> str:
    """How many answers to held-out rows are as expected, with a 95 % interval; "" without any.

    Args:
        bench: content of `bench.json`.
    """
    rows = [row for rows in bench.get("answers", {}).values() for row in rows]
    if not rows:
        return ""
    adapters, pack, base = (
        sum(same_text(row[name], row["expected"]) for row in rows)
        for name in ("individual", "pack", "base")
    )
    # Wilson's interval (https://doi.org/10.2307/2276774).
    share, more = pack / len(rows), 1.96**2 / len(rows)
    half = 1.96 * math.sqrt(share * (1 - share) / len(rows) + more / (4 * len(rows)))
    low, high = ((share + more / 2 + side) / (1 + more) for side in (-half, half))
    text = (
        f"Of {len(rows)} answers to held-out rows {adapters} of the adapters are as expected,"
        f" {pack} of the pack (95% interval {percent(low)} to {percent(high)}), {base} of the base"
        " model."
    )
    return f"{text} So few answers tell little." if len(rows) < _FEW_ANSWERS else text


def questions(bench: Json, n: int = 3) -> list[str]:
    """Held-out questions with the answers of base, task adapter and pack, in lines; [] without any.

    At most one of a task: a question that its adapter answers as expected and the base does not.

    Args:
        bench: content of `bench.json`.
        n: most questions.
    """
    telling = []
    for task, rows in bench.get("answers", {}).items():
        for row in rows:
            right, base = (same_text(row[name], row["expected"]) for name in ("individual", "base"))
            if right and not base:
                telling.append((task, row))
                break
    lines, n = [], min(n, len(telling))
    # Spread over the tasks, which are sorted by name and so by kind.
    for task, row in (telling[i * len(telling) // n] for i in range(n)):
        lines.append(f"{task}: {row['prompt']}")
        for label, name in (("base", "base"), ("adapter", "individual"), ("pack", "pack")):
            answer = " ".join(row[name].split())
            lines.append(f"  {label:<8} {answer if len(answer) <= 88 else answer[:85] + '...'}")
    return lines


def next_commands(output: str, task: str, model: str | None, compact: bool) -> list[str]:
    """Three commands that use the pack of a run.

    Args:
        output: the run directory.
        task: one of its tasks.
        model: its base model, as `--model` takes it; None is the embedded one.
        compact: the pack is one file, which other programs cannot load.
    """
    base = f" --model {shlex.quote(model)}" if model else ""
    name, run, to = program(), shlex.quote(output), "mlx" if compact else "peft"
    return [
        f'{name} generate {run} --task {shlex.quote(task)}{base} "..."',
        f"{name} export {run} --to {to} --output {run}/{to}",
        f"{name} serve {run}{base}",
    ]


def _context(artifacts: Mapping[str, Json]) -> Json:
    """What both templates show."""
    manifest, plan, measured = artifacts["manifest"], artifacts.get("plan"), "bench" in artifacts
    bench = artifacts["bench" if measured else "weights"]
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    tasks, share = pack["tasks"], pack["nbytes"] / inputs["nbytes"]
    key = "excess" if measured else "error"
    # A merge of one is the task adapter itself, which is not trained.
    facts: Any = artifacts.get("refines", ())
    refined = [bool(fact["refined"]) for fact in facts if plan or len(fact["members"]) > 1]
    units: Any = plan["units"] if plan else artifacts["merges"]
    # Merges are all of one rank, or nearly.
    total = sum(unit["nbytes"] for unit in units) if plan else len(units)
    colours, stored = itertools.cycle(charts.GROUP_COLOURS), []
    for number, unit in enumerate(units):
        served, part = (unit["tasks"], unit["nbytes"]) if plan else (unit["members"], 1)
        colour = next(colours) if len(served) > 1 else None
        shown = {"number": number, "tasks": served, "colour": colour, "part": part / total}
        stored.append({**unit, **shown})
    return {
        "measured": measured,
        "cost": _cost(bench),
        "losses": artifacts["losses"] if measured else {"tasks": sorted(tasks), **bench},
        "d2c": None if plan else artifacts["clusters"]["methods"]["d2c"][0],
        "plan": plan,
        "refined": refined,
        "stored": stored,
        "manifest": manifest,
        "rows": _rows(bench),
        "frontier": _frontier(plan, share, measured) if plan else None,
        "table": render_table(bench),
        "pack": pack,
        "share": share,
        "worst": sorted(tasks.items(), key=lambda kv: -kv[1][key]),
        "unpacked_nbytes": bench.get("unpacked_nbytes"),
        "methods": bench["methods"],
        "n_rows": max(map(len, bench.get("rows", {}).values()), default=0),
        "answers": bench.get("answers", {}),
        "right": answered(bench),
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


def _frontier(plan: Json, share: float, measured: bool) -> Json:
    """The budgets that a plan was made for, with the regret expected at each.

    Args:
        plan: content of `plan.json`.
        share: bytes of the pack over the adapters' 16-bit bytes.
        measured: False for a plan without rows, whose regrets are squared errors of dW.
    """
    stops = plan["frontier"]
    labels = {"own": "an adapter per task"}
    if all(row["merged"] is not None for row in stops):
        labels |= {"merged": "merged adapters only", "all": "the better of both"}
    return {
        "shares": [row["share"] for row in stops],
        "lines": {label: [row[key] for row in stops] for key, label in labels.items()},
        "unit": "expected regret on calibration rows" if measured else "squared error of dW",
        "pack": (share, plan["regret"]),
    }
