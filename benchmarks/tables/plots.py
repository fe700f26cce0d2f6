"""The plots of pages/*.md. Each function gets `read` of result_files.py."""

import statistics
from itertools import cycle

from benchmarks.tables import experiment as paper
from benchmarks.tables.packs import EXCESS_GOALS, budgets, cases, every, fitting, in_slots
from d2c_mlx.report.charts import COLOURS, TEXT, new_figure

BLUE, ORANGE, GREEN, GREY = COLOURS
# Excess is drawn linear around 0, which a plan or a refined merge may beat, logarithmic above.
LINEAR_BELOW = 0.01
EXCESS_TICKS = (-LINEAR_BELOW, 0, LINEAR_BELOW, 0.1, 1)


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
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_yticks(EXCESS_TICKS, [f"{y:g}" for y in EXCESS_TICKS])
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
    styles = {
        "auto": ("-o", ORANGE),
        "K-Means, layerwise": ("-s", BLUE),
        "D2C, mean": ("-^", GREEN),
    }
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
    """Excess of every case: for each K a dot at the mean, on a line over seeds and draws."""
    found = cases(read)
    # The order at the smallest K, where most is lost.
    names = list(dict.fromkeys(case for _, case, _ in found))
    figure, axes = new_figure(6, 0.2 * len(names) + 0.9)
    for k, colour in zip(sorted({k for k, *_ in found}), cycle(COLOURS)):
        places = [names.index(case) for at, case, _ in found if at == k]
        values = [every(rows, "excess") for at, _, rows in found if at == k]
        axes.hlines(places, list(map(min, values)), list(map(max, values)), color=colour)
        axes.plot(list(map(statistics.mean, values)), places, "o", color=colour,
                  label=f"K = {k}", markersize=4)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", color=TEXT, alpha=0.15)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_xticks(EXCESS_TICKS, [f"{x:g}" for x in EXCESS_TICKS])
    axes.minorticks_off()
    axes.set_xlabel("excess loss (nats per target token)")
    figure.legend(frameon=False, fontsize=8, labelcolor=TEXT, ncols=3, loc="outside upper left")
    return figure
