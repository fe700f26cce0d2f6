"""The short tables of README.md and docs/results.md, and the numbers of the README's picture.

Each function gets `read` of result_files.py; those in TABLES return lines of Markdown.
"""

import statistics

from benchmarks.tables.experiment import averages, ends, groups, share
from benchmarks.tables.packs import budgets, cases, every
from benchmarks.tables.result_files import markdown

# The README's budgets in bytes, then in adapters.
BYTES, SLOTS = ("12.5%", "3%"), (6, 3)
# Case in slots.json -> its name here.
CASES = {
    "estimates: layerwise": "d2c-mlx",
    "estimates": "d2c-mlx, layer by layer, all outputs alike",
    "estimates: refined": "the same, `--refine`",
    "moves: layerwise": "the same, clusters of its search before estimates",
    "random: layerwise": "the same, random clusters",
    "kmeans: layerwise": "the same, K-Means on the weights",
    "moves: tsv": "TSV, the best merge without data, on these clusters",
    "merge-all: layerwise": "layer by layer, all 24 in one",
    "paper, ties": "D2C as in the paper, TIES",
    "paper, linear": "D2C as in the paper, mean of dW",
}
METHODS = ("auto", "rank alone", "bits alone", "K-Means, layerwise", "K-Means")


def library(read):
    """`(adapters, bytes)` of the 24 adapters that slots.json and bytes.json were measured on."""
    _, _, rows = budgets(read("bytes"))
    first = next(iter(rows.values()))
    return first["own"] + first["merged"], round(first["nbytes"] / first["share"])


def in_bytes(read, budget):
    """`(bytes, excess, kept)` of the default plan for a budget in bytes."""
    (row,) = (one for one in read("plans")["rows"]
              if one["budget"] == budget and one["case"] == "plan"
              )  # fmt: skip
    return row["nbytes"], row["excess"], row["kept"]


def in_slots(read, k, case="estimates: layerwise"):
    """`(bytes, excess, kept)` of K adapters of the library's size, means over seeds."""
    n, nbytes = library(read)
    (rows,) = (some for at, name, some in cases(read) if (at, name) == (k, case))
    means = [statistics.mean(every(rows, key)) for key in ("excess", "kept")]
    return nbytes * k // n, *means


def summary(read):
    """Four budgets: what is stored, and what is lost; Gemma's slots are the same share of eight."""
    n, nbytes = library(read)
    lines = [
        (f"`{budget}`", f"{n} adapters, fewer components and bits", *in_bytes(read, budget), budget)
        for budget in BYTES
    ]
    lines += [(f"`{k}`", f"{k} merged adapters", *in_slots(read, k), f"{8 * k // n}")
              for k in SLOTS]  # fmt: skip
    gemma = {one["budget"]: one["kept"] for one in read("gemma")["rows"]}
    return markdown(
        (f"budget ({n} adapters, {nbytes / 1e6:.1f} MB)", "what is stored", "MB", "excess", "kept",
         "Gemma 3"),
        [(*words, f"{size / 1e6:.2f}", f"{excess:.3f}", f"{kept:.1%}", f"{gemma[other]:.1%}")
         for *words, size, excess, kept, other in lines], left=2,
    )  # fmt: skip


def methods(read):
    """Excess and kept of chosen cases at every K."""
    found = {(k, case): rows for k, case, rows in cases(read)}
    sizes = sorted({k for k, _ in found})
    lines = [
        (name, *(f"{statistics.mean(every(found[k, case], 'excess')):.3f},"
                 f" {statistics.mean(every(found[k, case], 'kept')):.1%}"
                 if (k, case) in found else "" for k in sizes))
        for case, name in CASES.items()
    ]  # fmt: skip
    return markdown(("in K adapters", *(f"K = {k}" for k in sizes)), lines)


def plans(read):
    """Bytes, excess and kept of a plan at every budget, all candidates measured."""
    each, _, rows = budgets(read("bytes"))
    lines = [
        (budget, f"{rows[budget, 'auto']['nbytes'] / 1e3:,.0f}",
         f"{rows[budget, 'auto']['excess']:.4f}", f"{rows[budget, 'auto']['kept']:.1%}")
        for budget in each
    ]  # fmt: skip
    return markdown(("budget of bytes", "file, KB", "excess", "kept"), lines, left=0)


def scores(read):
    """Share of the individual adapters' score that chosen methods keep, by budget."""
    result = read("experiment")
    _, ceiling = map(averages, ends(result))
    found = {
        (method, budget): share(statistics.mean(averages(row)[0] for row in rows), ceiling[0])
        for budget, method, rows in groups(result)
    }
    each = list(dict.fromkeys(budget for _, budget in found))
    lines = [(name, *(found.get((name, budget), "") for budget in each)) for name in METHODS]
    return markdown(("method", *each), lines)
