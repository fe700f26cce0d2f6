"""Tables of what packs lose: in slots, in bytes, and when adapters arrive one by one.

Each function gets `read` of result_files.py and returns lines of Markdown. Excess is in nats per
target token over the individual adapters.
"""

import statistics

from benchmarks.tables.answers import kept, kept_in_bytes
from benchmarks.tables.result_files import markdown, spread
from d2c_mlx.compose.methods import METHODS

# What this project set itself, not results: of the library, and of strongly trained adapters.
EXCESS_GOALS = {"12.5%": "0.003", "6.25%": "0.010", "3%": "0.03", "1.5%": "0.08", "0.75%": "0.2"}
KEPT_GOALS = {"12.5%": "99.5%", "6.25%": "99%", "3%": "97%", "1.5%": "93%", "0.75%": "85%"}
STRONG_GOALS = {"6.25%": "0.005", "3%": "0.02", "1%": "0.04"}


def cases(read):
    """`(K, case, rows)` of slots.json, a row per seed; the best case of each K first.

    The individual adapters, with which all is compared, have an excess of 0 and are left out.
    """
    groups = {}
    for one in read("slots")["rows"]:
        if one["case"] != "individual":
            groups.setdefault((one["clusters"], one["case"]), []).append(one)
    found = [(*key, rows) for key, rows in groups.items()]
    return sorted(found, key=lambda one: (one[0], statistics.mean(every(one[2], "excess"))))


def every(rows, key):
    """Values of all seeds, and of all draws of `random`: "excess" or "kept"."""
    return [value for one in rows for value in one[f"each_{key}"]]


def slots(read):
    """At most K adapters: the mean, and the range over seeds (and draws, of `random`)."""
    rows = [
        (f"{k}", case, spread(every(some, "excess"), ".3f"),
         spread(every(some, "kept"), ".1%"),
         ", ".join(sorted(f"{one['seed']}" for one in some)))
        for k, case, some in cases(read)
    ]  # fmt: skip
    return markdown(("K", "case", "excess", "kept", "seeds"), rows, left=2)


def fuse(read):
    """Gain kept in 4-bit models that hold one adapter, by the base that they were made of."""
    rows = []
    for case in read("fuse")["cases"]:
        stock, loss = case["stock"], case["losses"]["base"] - case["losses"]["adapter"]
        ways = ("error compensation", "8 bits for some")
        shares = (case["kept"].get(way) for way in ways)
        cells = (f"{share:.1%}" if share is not None else "" for share in shares)
        sizes = (f"{one['nbytes'] / 1e6:.1f}" for one in (stock, case))
        rows.append((case["base"], case["adapter"], f"{loss:.3f}", f"{stock['kept']:.1%}", *cells,
                     f"{case['kept'][case['how']]:.1%}", *sizes))  # fmt: skip
    head = ("base", "adapter", "gain, nats", "stock", "error compensation", "8 bits for some",
            "what is written", "stock, MB", "written, MB")  # fmt: skip
    return markdown(head, sorted(rows, key=lambda row: row[0]), left=2)


def in_slots(read, n_clusters):
    """The row of the default in slots.json with so many clusters and seed 0, or None."""
    for one in read("slots")["rows"]:
        if (one["clusters"], one["seed"], one["case"]) == (n_clusters, 0, "estimates"):
            return one
    return None


def fitting(read, budget):
    """The number of 16-bit adapters that fit a budget in percent; the library's are of one size."""
    return int(len(read("slots")["rows"][0]["tasks"]) * float(budget.rstrip("%")) / 100)


def budgets(result):
    """Budgets and families of a result of `bytes.py` in its order, and rows by both."""
    rows = {(one["budget"], one["family"]): one for one in result["rows"]}
    each, families = (list(dict.fromkeys(keys)) for keys in zip(*rows))
    return each, families, rows


def families_at(read, key, form, goals):
    """A measure of every family at every budget: the header and the rows."""
    each, families, rows = budgets(read("bytes"))
    first = [name for name in ("auto", "hindsight") if name in families]
    others = [name for name in families if name not in first]
    lines = []
    for budget in each:

        def cell(name, budget=budget):
            one = rows.get((budget, name))
            return format(one[key], form) if one else "not measured"

        n = fitting(read, budget)
        merged = in_slots(read, n)
        missing = "not measured" if n else "nothing fits"
        lines.append([budget, *map(cell, first), goals.get(budget, ""), *map(cell, others),
                      format(merged[key], form) if merged else missing])  # fmt: skip
    return ["budget", *first, "goal", *others, "D2C in 16 bit"], lines


def bytes_excess(read):
    """Excess loss of every family at every budget."""
    return markdown(*families_at(read, "excess", ".4f", EXCESS_GOALS), left=0)


def bytes_kept(read):
    """Retention of every family at every budget, and the bytes of the file of `auto`."""
    header, lines = families_at(read, "kept", ".1%", KEPT_GOALS)
    _, _, rows = budgets(read("bytes"))
    lines = [[*line, f"{rows[line[0], 'auto']['nbytes']:,}"] for line in lines]
    return markdown([*header, "bytes of auto"], lines, left=0)


def bytes_refined(read):
    """Plans, and the same trained: excess, kept and share of the score."""
    rows = read("plans")["rows"]
    trained = {one["budget"] for one in rows if one["case"] != "plan"}
    lines = [
        (one["budget"], one["case"], f"{one['excess']:.3f}", f"{one['kept']:.1%}",
         kept(read, one["case"], one["budget"]),
         f"{one['seconds']:.0f}" if one["case"] != "plan" else "")
        for one in rows if one["budget"] in trained
    ]  # fmt: skip
    return markdown(("budget", "case", "excess", "kept", "score", "seconds"), lines, left=2)


def bytes_strong(read):
    """Strongly trained adapters: `auto` beside its goal, and in hindsight."""
    each, _, rows = budgets(read("bytes-strong"))
    lines = [
        (budget, f"{rows[budget, 'auto']['excess']:.4f}", STRONG_GOALS.get(budget, ""),
         f"{rows[budget, 'auto']['kept']:.1%}", f"{rows[budget, 'hindsight']['excess']:.4f}")
        for budget in each
    ]  # fmt: skip
    header = ("budget", "auto, excess", "goal", "auto, kept", "hindsight, excess")
    return markdown(header, lines, left=0)


def order(read):
    """Arrivals in several orders, and what planning all at once reaches."""
    groups = {}
    for one in read("order")["rows"]:
        groups.setdefault((one["kind"], one["budget"], one["probes"]), []).append(one["excess"])
    _, _, planned = budgets(read("bytes"))
    rows = []
    for (kind, budget, probes), excess in groups.items():
        if kind == "slots":
            words, at_once = f"{budget} slots", in_slots(read, int(budget))
        else:
            words, at_once = f"{budget}% of the bytes", planned.get((f"{budget}%", "auto"))
        rows.append((
            words, f"{probes} probe rows per task" if probes else "weights", f"{len(excess)}",
            *(f"{x:.3f}" for x in (statistics.mean(excess), min(excess), max(excess))),
            f"{at_once['excess']:.3f}" if at_once else "not measured",
        ))  # fmt: skip
    header = ("pack", "added by", "orders", "mean", "best", "worst", "planned at once")
    return markdown(header, rows, left=2)


def gemma(read):
    """Packs of eight adapters of Gemma 3 at several budgets."""
    return markdown(("budget", "KB", "loss", "excess", "kept"), [
        (one["budget"] if "%" in one["budget"] else f"{one['budget']} slots",
         f"{one['nbytes'] / 1e3:,.0f}", f"{one['losses']['pack']:.3f}", f"{one['excess']:.4f}",
         f"{one['kept']:.1%}")
        for one in sorted(read("gemma")["rows"], key=lambda one: -one["nbytes"])
    ])  # fmt: skip


def without_rows(read):
    """Packs made by weights alone, or of answers to prompts, beside those made with rows."""
    beside = {}
    for one in read("slots")["rows"]:
        if one["case"] == "estimates":
            beside.setdefault(str(one["clusters"]), []).append(one["excess"])
    for one in read("bytes")["rows"]:
        if one["family"] == "auto":
            beside.setdefault(one["budget"], []).append(one["excess"])
    lines = []
    for one in read("without_rows")["rows"]:
        budget, case = one["budget"], one["case"]
        if "%" in budget:
            name, key, with_rows = budget, budget, kept_in_bytes(read, budget)
        else:
            name, key = f"{budget} slots", int(budget)
            with_rows = kept(read, "estimates", key)
        lines.append((
            name, case, f"{one['excess']:.3f}", f"{one['kept']:.1%}",
            kept(read, case, key),
            f"{statistics.mean(beside[budget]):.3f}" if budget in beside else "",
            with_rows,
        ))  # fmt: skip
    header = ("budget", "made by", "excess", "kept", "score", "with rows: excess", "score")
    return markdown(header, lines, left=2)


# The method that the held-out rows would choose.
HINDSIGHT = "best of auto's, in hindsight"


def compose(read, file="compose"):
    """A task left out at a time: what is made of the others and ten rows."""
    rows = read(file)["rows"]
    made = []
    for row in rows:
        found = {name: one for name, one in row["methods"].items() if name in METHODS}
        best = min(found.values(), key=lambda one: one["excess"])
        took = found[row["auto"]] | {"seconds": row["seconds"]}
        made.append({**row["methods"], "auto": took, HINDSIGHT: {**best, "chrf": None}})
    of = {name: [one[name] for one in made] for name in made[0] if all(name in m for m in made)}
    ends = [(one["base"]["loss"], one["base"]["loss"] - one["real"]["loss"]) for one in made]
    fresh = [one["excess"] for one in of.get("fresh", [])]
    lines = []
    for name, some in of.items():
        excess = [one["excess"] for one in some]
        kept = [(base - one["loss"]) / gain for one, (base, gain) in zip(some, ends)]
        chrf = [one["chrf"] for one in some if one["chrf"] is not None]
        ahead = sum(ours < theirs for ours, theirs in zip(excess, fresh))
        seconds = [one["seconds"] for one in some if "seconds" in one]
        lines.append((
            name, f"{statistics.mean(excess):.3f}", f"{statistics.mean(kept):.0%}",
            f"{statistics.mean(chrf):.1f}" if len(chrf) == len(made) else "",
            f"{ahead} of {len(made)}" if fresh and name != "fresh" else "",
            f"{statistics.mean(seconds):.0f}" if seconds else "",
        ))  # fmt: skip
    lines.sort(key=lambda line: float(line[1]))
    header = ("method", "excess", "gain kept", "chrF", "ahead of fresh", "seconds")
    return markdown(header, lines)


# Columns of the tables of single tasks and of two at once.
_SINGLE = ("base", "best", "arithmetic", "fresh")


def compose_tasks(read):
    """Excess on every task, and what `auto` took there."""
    lines = []
    for row in read("compose")["rows"]:
        parts = row["methods"]
        excess = [parts[name]["excess"] if name in parts else None for name in _SINGLE]
        cells = ["" if x is None else f"{x:.3f}" for x in (*excess, parts[row["auto"]]["excess"])]
        lines.append((row["task"], str(row["draw"]), *cells, row["auto"]))
    return markdown(("task", "draw", *_SINGLE, "auto", "which took"), lines)


def two_tasks(read):
    """Loss, chrF and exact answers of every way to do two tasks at once, by job and rows."""
    rows, lines = read("two_tasks")["rows"], []
    for job, n in sorted({(row["job"], row["rows"]) for row in rows}):
        some = [row["methods"] for row in rows if (row["job"], row["rows"]) == (job, n)]
        for name in some[0]:
            parts = [one[name] for one in some]
            loss = [one["loss"] for one in parts if "loss" in one]
            lines.append((
                job, name, str(n), f"{statistics.mean(loss):.3f}" if loss else "",
                f"{statistics.mean(one['chrf'] for one in parts):.1f}",
                f"{statistics.mean(one['exact_match'] for one in parts):.0f}%",
            ))  # fmt: skip
    return markdown(("job", "method", "rows", "loss", "chrF", "exact"), lines)
