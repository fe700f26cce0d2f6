"""The plots of benchmarks/README.md. Each function gets `read` of result_files.py."""

import statistics

import tables_of_experiment as paper
from tables_of_packs import EXCESS_GOALS, budgets, cases, every, fitting, in_slots

from d2c_mlx.charts import COLOURS, TEXT, new_figure

BLUE, ORANGE, GREEN, GREY = COLOURS


def bytes_excess(read):
    """Excess of every family by budget; the goals."""
    each, families, rows = budgets(read("bytes"))
    lines = {name: {b: rows[b, name]["excess"] for b in each if (b, name) in rows}
             for name in families}  # fmt: skip
    merged = {budget: in_slots(read, fitting(read, budget)) for budget in each}
    lines["D2C in 16 bit"] = {b: row["excess"] for b, row in merged.items() if row}
    lines["goal"] = {b: float(EXCESS_GOALS[b]) for b in each if b in EXCESS_GOALS}
    styles = {"auto": ("-o", ORANGE), "hindsight": (":", ORANGE), "rank alone": ("-s", BLUE),
              "bits alone": ("-^", GREEN), "goal": ("_", TEXT)}  # fmt: skip
    figure, axes = new_figure(6, 3.6)
    for name, points in lines.items():
        style, colour = styles.get(name, ("-D", GREY))
        axes.plot([float(b.rstrip("%")) for b in points], list(points.values()), style,
                  color=colour, label=name, markersize=10 if name == "goal" else 4)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([float(b.rstrip("%")) for b in each], each)
    # Linear around 0, which a plan may beat.
    axes.set_yscale("symlog", linthresh=0.01)
    ticks = (-0.01, 0, 0.01, 0.1, 1)
    axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axes.minorticks_off()
    values = [y for points in lines.values() for y in points.values()]
    axes.set_ylim(1.5 * min(*values, -0.002), 1.5 * max(values))
    axes.axhline(0, color=TEXT, linewidth=0.8)
    axes.set_xlabel("budget, % of the adapters' 16-bit bytes")
    axes.set_ylabel("excess loss (nats per target token)")
    figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=3, loc="outside upper left")
    return figure


def experiment(read):
    """Average score of every method by budget, and of the individual adapters."""
    result = read("experiment")
    lines = {}
    for budget, method, rows in paper.groups(result):
        share = float(budget.rstrip("%"))
        lines.setdefault(method, {})[share] = statistics.mean(
            paper.averages(row)[0] for row in rows
        )
    styles = {"auto": ("-o", ORANGE), "D2C, moves": ("-s", BLUE), "D2C, mean": ("-^", GREEN)}
    marks = iter("Dvx+*pPhX<>")
    figure, axes = new_figure(6, 3.6)
    for method, points in lines.items():
        style, colour = styles.get(method) or (f"-{next(marks)}", GREY)
        axes.plot(list(points), list(points.values()), style, color=colour, label=method,
                  markersize=4)  # fmt: skip
    for row in paper.ends(result):
        axes.axhline(paper.averages(row)[0], color=TEXT, linewidth=0.8, linestyle=":")
        axes.annotate(row["method"], (1, paper.averages(row)[0]), color=TEXT, fontsize=8,
                      xycoords=("axes fraction", "data"), va="bottom", ha="right")  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({budget for points in lines.values() for budget in points})
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("budget, % of the adapters' 16-bit bytes")
    axes.set_ylabel("average score, %")
    figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=3, loc="outside upper left")
    return figure


def slots(read):
    """Excess of every case: a bar for the mean, a point per seed."""
    rows = [(f"K = {k}: {case}", every(some, "excess")) for k, case, some in cases(read)]
    names = [name for name, _ in rows]
    figure, axes = new_figure(6, 0.34 * len(rows) + 0.7)
    means = [sum(values) / len(values) for _, values in rows]
    axes.barh(names, means, color=BLUE)
    for (name, values), mean in zip(rows, means):
        axes.plot(values, [name] * len(values), "|", color=ORANGE, markersize=10)
        axes.annotate(f"{mean:.3f}", (max(values), name), (6, 0), textcoords="offset points",
                      color=TEXT, fontsize=9, va="center")  # fmt: skip
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("excess loss (nats per target token)")
    return figure
