"""Tables of greedy answers of merged adapters, beside those of the adapters themselves.

Each function gets `read` of result_files.py and returns lines of Markdown. Scores are in percent by
the metric of each task.
"""

import statistics

import numpy as np

from benchmarks.common import slug
from benchmarks.quality.metrics import pooled_bootstrap
from benchmarks.tables.experiment import averages, ends, groups, share
from benchmarks.tables.result_files import kind_of, markdown

# Kinds of task whose answers are right or wrong.
EXACT = ("date", "num")
# Two cases of scores.json, or one beside a method of results/rows_24, on the same test rows.
PAIRS = (
    ("estimates", "individual"),
    ("estimates", "K-Means-layerwise"),
    ("estimates", "kmeans-layerwise"),
    ("estimates-refined", "individual"),
    ("estimates-refined", "estimates"),
    ("estimates-refined", "estimates-refined-held-back"),
    ("estimates-refined", "kmeans-layerwise"),
    ("estimates-rank-16", "estimates"),
    ("estimates-rank-64", "estimates"),
    ("estimates-rank-64", "individual"),
)
# Slots at which pairs are compared, the share of the 24 adapters in rows_24, and draws there.
SLOTS, SHARE, SEEDS = 3, "12.5", (0, 1, 2)
# Cases that have tables of their own, `without_rows` and `bytes_refined` of packs.py.
ELSEWHERE = ("weights", "prompts", "plan", "plan-refined", "plan-refined-with-prompts")


def answers(read):
    """Score by kind of task under merged adapters, and its share of the own adapters'."""
    rows = grouped(read)
    (own,) = rows["individual", None]
    kinds = dict.fromkeys(map(kind_of, own))
    exact = [name for name in own if kind_of(name) in EXACT]
    beside = read("slots")["rows"]
    lines = paper_rows(read("paper"), len(kinds))
    rows = {key: some for key, some in rows.items() if key[0] not in ELSEWHERE}
    for (case, k), some in sorted(rows.items(), key=lambda item: item[0][1] or 0):
        means = {name: statistics.mean(one[name]["score"] for one in some) for name in own}
        of = [[means[name] for name in own if kind_of(name) == kind] for kind in kinds]
        lines.append((f"{k}" if k else "", case, f"{len(some)}",
                      *(f"{statistics.mean(one):.1f}" for one in of),
                      f"{statistics.mean(means.values()):.1f}",
                      *(share_of(some, own, names) if k else "" for names in (own, exact)),
                      *costs(beside, case, k)))  # fmt: skip
    shared = ("all", "of their own", "exact ones", "excess", "seconds")
    return markdown(("K", "case", "draws", *kinds, *shared), lines, left=2)


def grouped(read):
    """Case and budget -> of every draw, task -> its score and more."""
    rows = {}
    for one in read("scores")["rows"]:
        rows.setdefault((one["case"], one["clusters"]), []).append(one["tasks"])
    return rows


def share_of(some, own, names):
    """The share of the own adapters' score on tasks `names`, mean over draws; "" without any."""
    means = [statistics.mean(one[name]["score"] for name in names) for one in (own, *some)]
    return share(statistics.mean(means[1:]), means[0]) if some else ""


def kept(read, case, budget):
    """The share of the adapters' score that a case keeps; "" where it was not measured."""
    rows = grouped(read)
    (own,) = rows["individual", None]
    return share_of(rows.get((case, budget), []), own, own)


def kept_in_bytes(read, budget):
    """The same of `auto` with rows, of the experiment on these adapters."""
    result = read("experiment_24")
    _, (ceiling, _) = map(averages, ends(result))
    found = [rows for *key, rows in groups(result) if key == [budget, "auto"]]
    scores = [averages(row)[0] for rows in found for row in rows]
    return share(statistics.mean(scores), ceiling) if scores else ""


def paper_rows(paper, n_kinds):
    """Rows of the paper's own scores, on its own adapters and tasks."""
    slots, nothing = f"{paper['slots']} of {paper['adapters']}", [""] * n_kinds
    return [
        (slots, f"{name} of the paper", "", *nothing, f"{score:.1f}", "", "", "", "")
        for name, score in paper["scores"].items()
    ]  # fmt: skip


def costs(beside, case, k):
    """Excess, and seconds to merge and refine, of a case of scores.json, by rows of slots.json."""
    rows = [one for one in beside if (slug(one["case"]), one["clusters"]) == (case, k)]
    seconds = [sum(one["stages"].values()) for one in rows if one.get("stages")]
    return (f"{statistics.mean(one['excess'] for one in rows):.3f}" if rows else "",
            f"{statistics.mean(seconds):.0f}" if seconds else "")  # fmt: skip


def stats(read, case):
    """Draw -> task -> what every test row adds to the score, of a case or a method of rows_24."""
    rows = {one["seed"]: one["tasks"] for one in read("scores")["rows"]
            if (one["case"], one["clusters"]) in ((case, SLOTS), (case, None))}  # fmt: skip
    if not rows:
        rows = {seed: read(f"rows_24/{case}-{SHARE}-{seed}-0-10")["tasks"] for seed in SEEDS}
    return {seed: {name: np.array(one["stats"]) for name, one in tasks.items()}
            for seed, tasks in rows.items()}  # fmt: skip


def pairs(read):
    """Cases beside each other on the same test rows, the draws of probe rows that both have."""
    lines = []
    for case, other in PAIRS:
        ours, theirs = stats(read, case), stats(read, other)
        both = [(ours[seed], theirs.get(seed, theirs.get(None)))
                for seed in ours if seed in theirs or None in theirs]  # fmt: skip
        found = pooled_bootstrap(both)
        lines.append((case, other, f"{found['difference']:+.1f}",
                      f"{found['low']:+.1f} to {found['high']:+.1f}", f"{len(both)}"))  # fmt: skip
    return markdown(("case", "beside", "points of score", "95 %", "draws"), lines, left=2)


def departures(read):
    """First differences of merged adapters' answers from the own adapters', by kind of task."""
    groups, rows = {}, []
    default = [one for one in read("scores")["rows"] if one["case"] == "estimates"]
    for one in sorted(default, key=lambda one: one["clusters"]):
        for name, task in one["tasks"].items():
            each = groups.setdefault((one["clusters"], kind_of(name)), [])
            each += zip(task["is_own"], task["same_words"], task["length"])
    for (k, kind), each in groups.items():
        others = [(same, length) for is_own, same, length in each if not is_own]
        at_once = [same == 0 for same, _ in others]
        rows.append((
            f"{k}", kind, f"{1 - len(others) / len(each):.0%}",
            *(f"{statistics.mean(some):.0%}" for some in (at_once, *zip(*others))),
        ))  # fmt: skip
    header = ("K", "kind", "the same", "others: first word differs", "same words before",
              "length")  # fmt: skip
    return markdown(header, rows, left=2)
