"""Tables of the paper's experiment: the library's adapters, methods, clusters, ablations.

Each function gets `read` of result_files.py and returns lines of Markdown. Scores are in percent by
the metric of each task, excess in nats per target token over the individual adapters.
"""

import statistics

from benchmarks.tables.result_files import kind_of, markdown, spread

ENDS = ("base", "individual")
RANKS = (1, 2, 4, 8, 16, 32)


def averages(row, tasks=None):
    """`(score, loss)` of a row: means over tasks."""
    losses, scores = zip(*(row["tasks"][task] for task in tasks or row["tasks"]))
    return statistics.mean(scores), statistics.mean(losses)


def groups(result):
    """`(budget, method, rows)`, a row per seed and draw; large budgets and good methods first."""
    found = {}
    for row in result["rows"]:
        if row["method"] not in ENDS:
            found.setdefault((row["budget"], row["method"]), []).append(row)
    return sorted(
        ((*key, rows) for key, rows in found.items()),
        key=lambda one: (
            -float(one[0].rstrip("%")),
            -statistics.mean(averages(row)[0] for row in one[2]),
        ),
    )


def ends(result):
    """The rows of the base model and of the individual adapters."""
    return [next(row for row in result["rows"] if row["method"] == name) for name in ENDS]


def share(score, ceiling):
    """A score as a share of the ceiling, which is 0 where no adapter scores on any row."""
    return f"{score / ceiling:.1%}" if ceiling else ""


def experiment(read, file="experiment"):
    """The table in the paper's form: average score and storage, and the share of the ceiling."""
    result = read(file)
    base, ceiling = map(averages, ends(result))
    lines = [
        ("0%", "base", f"{base[0]:.1f}", share(base[0], ceiling[0]), "0%",
         f"{base[1] - ceiling[1]:.4f}", "", ""),
        ("100%", "individual", f"{ceiling[0]:.1f}", "100%", "100%", "0", "", ""),
    ]  # fmt: skip
    for budget, method, rows in groups(result):
        scores, losses = zip(*map(averages, rows))
        ahead = [row["auto_against_it"] for row in rows if "auto_against_it" in row]
        lines.append((
            budget, method, spread(scores, ".1f"),
            share(statistics.mean(scores), ceiling[0]),
            f"{statistics.mean(row['share'] for row in rows):.2%}",
            spread([loss - ceiling[1] for loss in losses], ".4f"), interval(ahead),
            f"{len({row['seed'] for row in rows})} x {len({row['draw'] for row in rows})}",
        ))  # fmt: skip
    return markdown(
        ("budget", "method", "score", "of the ceiling", "bytes used", "excess",
         "`auto` is ahead by (95 %)", "seeds x draws"), lines, left=2,
    )  # fmt: skip


def interval(found):
    """A paired difference over test rows and its 95 % interval: the widest of all seeds, draws."""
    if not found:
        return ""
    middle = statistics.mean(one["difference"] for one in found)
    low, high = min(one["low"] for one in found), max(one["high"] for one in found)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def pairs(read, file="experiment"):
    """Methods beside each other on the same test rows, the draws of both pooled."""
    order = [(budget, method) for budget, method, _ in groups(read(file))]
    found = sorted(read(file)["pairs"], key=lambda one: order.index((one["budget"], one["method"])))
    lines = [
        (one["budget"], one["method"], one["beside"],
         f"{one['difference']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})",
         ", ".join(map(str, one["seeds"])))
        for one in found
    ]  # fmt: skip
    return markdown(
        ("budget", "method", "beside", "points of score (95 %)", "seeds"), lines, left=3
    )


def worse(read):
    """The number of tasks with a higher loss than under their own adapters, by seed and draw."""
    _, ceiling = ends(read("experiment"))
    lines = []
    for budget, method, rows in groups(read("experiment")):
        if method == "auto":
            counts = [
                sum(loss > ceiling["tasks"][task][0] for task, (loss, _) in row["tasks"].items())
                for row in rows
            ]
            lines.append((budget, f"{len(ceiling['tasks'])}", ", ".join(map(str, counts))))
    return markdown(("budget of `auto`", "tasks", "with a higher loss, a draw each"), lines)


def kinds(read):
    """Scores by kind of task, of the first seed and draw."""
    result = read("experiment")
    first = [
        (f"{method}, {budget}", rows[0])
        for budget, method, rows in groups(result) if method == "auto" or budget == "12.5%"
    ]  # fmt: skip
    columns = [*zip(ENDS, ends(result)), *first]
    names = {}
    for task in columns[0][1]["tasks"]:
        names.setdefault(kind_of(task), []).append(task)
    rows = [
        (name, *(f"{averages(row, tasks)[0]:.1f}" for tasks in names.values()))
        for name, row in columns
    ]
    header = [f"{kind}, {result['metrics'][kind]}, {len(some)}" for kind, some in names.items()]
    return markdown(("method", *header), rows)


def clusters(read):
    """Adjusted Rand index of clusters with kinds of task, and with languages."""
    lines = []
    for budget, method, rows in groups(read("experiment")):
        found = [row["follows"] for row in rows if "follows" in row]
        if found:
            each = ([one[what] for one in found] for what in ("kinds", "languages"))
            lines.append((budget, method, *(spread(values, ".2f") for values in each)))
    return markdown(("budget", "method", "kinds of task", "languages"), lines, left=2)


def ablations(read):
    """Each choice of D2C alone, at one budget: mean and range over seeds."""
    found = {}
    for row in read("ablations")["rows"]:
        found.setdefault((row["case"], row["value"]), []).append(row)
    lines = []
    for (case, value), rows in found.items():
        follows = [statistics.mean(row["follows"][what] for row in rows)
                   for what in ("kinds", "languages")]  # fmt: skip
        regrets = [row["probe_regret"] for row in rows if row["probe_regret"] is not None]
        lines.append((
            case, value, spread([row["excess"] for row in rows], ".3f"),
            spread([row["kept"] for row in rows], ".1%"),
            spread([row["score"] for row in rows], ".1f"),
            spread(regrets, ".3f") if regrets else "",
            ", ".join(f"{one:.2f}" for one in follows),
            ", ".join(f"{row['seed']}" for row in rows),
        ))  # fmt: skip
    return markdown(
        ("choice", "value", "excess", "kept", "score", "regret on probes",
         "Rand: kinds, languages", "seeds"), lines, left=2,
    )  # fmt: skip


def agreement(read):
    """Agreement of probe and test rows on the best cluster: mean and range over seeds."""
    found = {}
    for row in read("ablations")["rows"]:
        if "agree" in row:
            found.setdefault(row["value"], []).append(row)
    lines = [
        (value, *(spread([row[key] for row in rows], form)
                  for key, form in (("agree", ".0%"), ("costs", ".4f"), ("own_is_best", ".0%"))))
        for value, rows in found.items()
    ]  # fmt: skip
    header = ("clusters", "probes choose the best", "else it costs", "own cluster is best")
    return markdown(header, lines)


def library(read):
    """Trained adapters by kind of task: means over adapters."""
    found = {}
    for row in read("library")["rows"]:
        found.setdefault(kind_of(row["name"]), []).append(row)
    lines = [
        (kind, f"{len(rows)}", f"{sum(row['steps'] >= 300 for row in rows)}",
         f"{statistics.mean(row['base'] for row in rows):.3f}",
         f"{statistics.mean(row['loss'] for row in rows):.3f}",
         ", ".join(row["name"] for row in rows if not row["beats_base"]) or "none",
         f"{sum(row['seconds'] for row in rows) / 60:.0f}")
        for kind, rows in found.items()
    ]  # fmt: skip
    return markdown(
        ("kind", "adapters", "strong", "base", "trained", "do not beat the base", "minutes"), lines
    )


def train_mlx(read):
    """Adapters trained by mlx-lm."""
    lines = [
        (row["name"], f"{row['base']:.4f}", f"{row['loss']:.4f}", f"{row['stock_difference']:.1e}",
         f"{row['seconds']:.0f}")
        for row in read("train_mlx")["rows"]
    ]  # fmt: skip
    header = ("adapter", "base", "trained", "mlx-lm's own loss: difference", "seconds")
    return markdown(header, lines)


def decay(read):
    """Singular values by kind, and by rank: means over adapters."""
    every, rows = read("decay")["adapters"], []
    for kind in ("weak", "strong"):
        some = [one for one in every if one["kind"] == kind]
        named = [(kind, some)]
        ranks = sorted({one["rank"] for one in some})
        if len(ranks) > 1:
            named += [
                (f"{kind}, rank {rank}", [one for one in some if one["rank"] == rank])
                for rank in ranks
            ]
        attention = [one["attention"] for one in some if one.get("attention")]
        named.append((f"{kind} with MLP, their attention only", attention))
        rows += [spectrum(name, found) for name, found in named if found]
    header = ("adapters", "n", *(f"energy in {k}" for k in RANKS), "rank for 90%", "for 99%",
              "stable rank", "effective rank")  # fmt: skip
    return markdown(header, rows)


def spectrum(name, found):
    """One line of `decay`."""
    largest = max(len(one["cumulative"]) for one in found)
    shares = [
        [one["cumulative"][min(k, len(one["cumulative"])) - 1] for one in found]
        if k <= largest else []
        for k in RANKS
    ]  # fmt: skip
    means = [
        f"{statistics.mean(one[key] for one in found):.1f}"
        for key in ("rank_90", "rank_99", "stable_rank", "effective_rank")
    ]
    return (
        name,
        f"{len(found)}",
        *(f"{statistics.mean(x):.1%}" if x else "" for x in shares),
        *means,
    )
