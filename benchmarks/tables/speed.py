"""Tables of what is fast and small: the engine, merging, phone.

Each function gets `read` of result_files.py and returns lines of Markdown.
"""

import numpy as np

from benchmarks.tables.result_files import markdown


def probe(read):
    """The probe engine: whatever was measured of it, and targets."""
    result = read("probe")
    rows = []
    if "tokens_per_second" in result:
        rows += engine(result)
    if "evaluations_asked" in result:
        rows += [
            ("D2C: evaluations asked for", f"{result['evaluations_asked']}", ""),
            ("D2C: evaluations done", f"{result['evaluations_done']:.0f}", ""),
            ("D2C: asked for / done", f"{result['evaluations_ratio']:.2f}", "5"),
            ("D2C: seconds", f"{result['d2c_seconds']:.0f}", ""),
        ]
    for stage, one in result.get("growth", {}).items():
        sizes = ", ".join(map(str, result["growth_sizes"]))
        seconds = ", ".join(f"{s:.1f}" for s in one["seconds"])
        target = "2" if stage == "probe" else "1"
        rows.append((f"{stage}: seconds for N = {sizes}; exponent",
                     f"{seconds}; {one['exponent']:.2f}", target))  # fmt: skip
    if "ranks_ratio" in result:
        same = "the same bytes" if result["ranks_same_bytes"] else "OTHER BYTES"
        seconds = ", ".join(f"{one:.1f}" for one in result["ranks_seconds"].values())
        rows.append(("one rank on all cores, two on the same, two under mlx.launch: seconds",
                     f"{seconds}; {result['ranks_ratio']:.2f}, {same}", ""))  # fmt: skip
    return markdown(("what", "value", "target"), rows)


def engine(result):
    """The engine's rows of the table above."""
    return [
        ("d2c-mlx, tokens/s", f"{result['tokens_per_second']:.0f}", ""),
        ("mlx-lm loop, float32, our BLAS: times slower",
         f"{result['speedup_vs_mlx_lm_loop']:.2f}", "10"),
        ("mlx-lm loop, float32, the wheel's BLAS: times slower (6 rows, scaled)",
         f"{result['speedup_vs_mlx_lm_loop_own_blas']:.0f}", ""),
        ("mlx-lm loop, 4 bit as stored, the wheel's BLAS: times slower (12 tokens, scaled)",
         f"{result['speedup_vs_mlx_lm_loop_as_stored']:.0f}", ""),
        ("PEFT on torch: times slower", f"{result['speedup_vs_peft']:.2f}", "2"),
        ("useful FLOPs, share of a plain float32 matmul", f"{result['sgemm_share']:.0%}", "50%"),
        ("largest loss difference to the plain loop (nats per token)",
         f"{result['max_loss_difference']:.1e}", "1e-4"),
    ]  # fmt: skip


def merge(read):
    """Merging against PEFT, and the ratio of what it takes."""
    result = read("merge")
    layers, of = result["peft"]["layers"], result["ours"]["layers"]
    note = f", extrapolated from {layers} of {of} layers" if layers < of else ""
    rows = [
        (label, f"{one['seconds_all_layers']:.1f}", f"{one['cpu_seconds_all_layers']:.1f}",
         f"{one['peak_nbytes'] / 1e9:.2f}", f"{one['error']:.1e}",
         f"{one['excess_truncation_error']:.1e}")
        for label, one in (("d2c-mlx `linear`", result["ours"]),
                           (f"PEFT `svd` on torch{note}", result["peft"]))
    ]  # fmt: skip
    ratio = result["ratio"]
    rows.append(("ratio", f"{ratio['seconds']:.1f}", f"{ratio['cpu_seconds']:.1f}", "", "", ""))
    header = ("side", "seconds", "CPU seconds", "peak GB", "largest relative error of dW",
              "truncation error above the best")  # fmt: skip
    return markdown(header, rows)


def large(read):
    """Seconds, peak memory and evaluated tokens of every stage on models of other shapes."""
    rows = []
    for name, one in read("large").items():
        for stage, found in one["stages"].items():
            tokens = f"{found['tokens']:,}" if "tokens" in found else ""
            peak = f"{found['peak_nbytes'] / 1e9:.2f}"
            rows.append((name, stage, f"{found['seconds']:.0f}", peak, tokens))
    return markdown(("run", "stage", "seconds", "peak GB", "tokens"), rows, left=2)


def phone(read):
    """Packs on every width of the base: what quantizing takes, and what a pack takes on top."""
    result = read("phone")
    rows = [
        (bits, name, f"{row['nbytes'] / 1e6:.2f}", f"{row['loss']:.4f}",
         f"{row['quantizing']:.4f}", f"{row['excess']:.4f}" if name in result["packs"] else "-",
         f"{row['kept']:.1%}", f"{row['right']:.1%}")
        for bits, methods in result["quality"].items() for name, row in methods.items()
    ]  # fmt: skip
    header = ("bits", "adapters", "MB", "loss", "quantizing takes", "the pack takes on top", "kept",
              "right answers")  # fmt: skip
    return markdown(header, rows, left=2)


def phone_memory(read):
    """Peaks on a device at every width and context: one adapter, all of the largest pack loaded."""
    result, rows = read("phone"), {}
    largest = max(result["packs"], key=lambda name: result["packs"][name]["nbytes"])
    for row in result["sweep"]:
        if row["pack"] == largest:
            key = row["bits"], f"{row['context']:,}"
            cells = rows.setdefault(key, {})
            cells[row["kv_bits"], row["resident"] > 1] = f"{row['peak'] / 1e6:.0f}"
    kinds = [(kv, many) for kv in (16, 8, 4) for many in (False, True)]
    header = (
        "bits",
        "context",
        *(f"KV {kv} bit, {'all' if many else 'one'}" for kv, many in kinds),
    )
    return markdown(
        header, [(*key, *(cells[kind] for kind in kinds)) for key, cells in rows.items()]
    )


def switch(read):
    """Change of adapter in every run that measured it alone, and as it was before."""
    result, rows = read("switch"), []
    runs = {f"{i + 1}": run for i, run in enumerate(result["runs"])}
    for name, run in {**runs, "before": result["before"]}.items():
        pack, stock = run["pack"], run["stock"]
        ready = pack["read_seconds"] + pack["attach_seconds"]
        rows.append((
            name, f"{1000 * ready:.0f}", f"{1000 * stock['reload_seconds']:.0f}",
            f"{run['ratio_before_token']:.1f}", f"{1000 * pack['seconds']:.0f}",
            f"{1000 * stock['seconds']:.0f}", f"{run['ratio']:.1f}",
        ))  # fmt: skip
    header = ("run", "model ready, ms", "stock mlx-lm's reload, ms", "times less (target 20)",
              "with one token, ms", "stock, ms", "times less")  # fmt: skip
    return markdown(header, rows)


def stages(read, file="stages"):
    """Where the time of a run goes, before and now; a ratio per run."""
    rows, found = [], read(file)["rows"]
    for budget in dict.fromkeys(one["budget"] for one in found):
        of = {one["checkout"]: {} for one in found if one["budget"] == budget}
        for one in found:
            if one["budget"] == budget:
                of[one["checkout"]][one["stage"]] = one
        before, now = of["before"], of["now"]
        kind = budget if "%" in budget else f"{budget} slots"
        for stage in before:
            rows.append((kind, stage, *_work(before[stage]), *_work(now[stage]), ""))
        sums = [
            {
                key: sum(one[key] for one in run.values())
                for key in ("cpu_seconds", "evaluations", "tokens")
            }
            for run in (before, now)
        ]
        ratio = sums[1]["cpu_seconds"] / sums[0]["cpu_seconds"]
        rows.append((kind, "all", *_work(sums[0]), *_work(sums[1]), f"{ratio:.2f}"))
    header = ("budget", "stage", "CPU s before", "evaluations", "tokens", "CPU s now",
              "evaluations", "tokens", "now / before")  # fmt: skip
    return markdown(header, rows, left=2)


def _work(one):
    return f"{one['cpu_seconds']:.1f}", f"{one['evaluations']:,.0f}", f"{one['tokens']:,}"


def search(read):
    """Clustering against the number of adapters, with a model and with estimates given."""
    result, rows, counts = read("search"), [], []
    for one in result["clustered"]:
        seconds = (f"{one['seconds'][name]:.0f}" for name in ("convert", "probe", "cluster"))
        counts.append(sum(one["evaluations"].values()))
        rows.append((f"{one['n']} in {max(1, one['n'] // 8)}", *seconds, f"{counts[-1]:,.0f}",
                     f"{one['peak_mb']:,}"))  # fmt: skip
    if len(counts) > 1:
        of = [[one["seconds"][name] for one in result["clustered"]]
              for name in ("convert", "probe", "cluster")]  # fmt: skip
        sizes = np.log([one["n"] for one in result["clustered"]])
        found = (f"{np.polyfit(sizes, np.log(some), 1)[0]:.2f}" for some in [*of, counts])
        rows.append(("exponent", *found, ""))
    for one in result["alone"]:
        rows.append((f"{one['n']} in {one['slots']}, estimates given", "", "",
                     f"{one['seconds']:.1f}", "0", f"{one['peak_mb']:,}"))  # fmt: skip
    header = ("adapters in slots", "convert, s", "probe, s", "cluster, s", "evaluations", "peak MB")
    return markdown(header, rows)


def plans(read):
    """Plans; trained ones are in `packs.bytes_refined`."""
    rows = [
        (one["budget"], f"{one['evaluations']:,}", f"{one['seconds']:.0f}",
         f"{one['regret']:.4f}", f"{one['excess']:.4f}")
        for one in sorted(read("plans")["rows"], key=lambda one: -float(one["budget"].rstrip("%")))
        if one["case"] == "plan"
    ]  # fmt: skip
    header = ("budget", "evaluations", "seconds", "regret", "held-out excess")
    return markdown(header, rows)
