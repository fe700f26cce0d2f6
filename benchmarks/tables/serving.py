"""Tables of routing and of a pack served to many clients.

Each function gets `read` of result_files.py and returns lines of Markdown.
"""

from benchmarks.tables.result_files import markdown

# Router in routers.json -> its words.
ROUTERS = {
    "states": "states: `d2c-mlx route`, fitted on probes",
    "arrow by prompt": "Arrow, the adapter with most votes of a prompt",
    "entropy": "lowest entropy of the first token, the base model among the candidates",
    "arrow by token, 1": "Arrow, per token and module, best 1",
    "arrow by token, 4": "Arrow, per token and module, best 4",
}
# In the order of tables.
SERVERS = ["d2c-mlx", "mlx_lm.server", "llama-server"]


def routers(read):
    """Routing that needs no probes beside the router that is fitted on them, best first."""
    result = read("routers")
    rows = [("the task is named", "100%", "", f"{result['labelled_loss']:.3f}", "")]
    for name, one in sorted(result["routers"].items(), key=lambda item: item[1]["loss"]):
        chosen = "right" in one
        rows.append((
            ROUTERS.get(name, name), f"{one['right']:.1f}%" if chosen else "",
            f"{one['foreign_accepted']:.0f}%" if chosen else "", f"{one['loss']:.3f}",
            f"{one['seconds']:.3f}" if "seconds" in one else "",
        ))  # fmt: skip
    return markdown(("router", "right", "foreign prompts taken for a task", "loss", "s"), rows)


def _cells(read):
    """`(clients, server, tasks, room)` of clients.json -> sums over rounds."""
    found = {}
    for one in read("clients")["rows"]:
        cell = found.setdefault((one["clients"], one["server"], one["tasks"], one["room"]), {})
        for key, value in one.items():
            if key not in ("clients", "server", "tasks", "room", "round"):
                cell[key] = cell[key] + value if key in cell else value
    return dict(sorted(found.items(), key=lambda item: (item[0][0], SERVERS.index(item[0][1]))))


def clients(read):
    """Tokens by the processor seconds of every server, and what mixing adapters costs it."""
    groups = {}
    for (n, server, tasks, _), one in _cells(read).items():
        # The first is that with room for all.
        groups.setdefault((n, server), {}).setdefault(tasks, one)
    rows = []
    for (n, server), of in groups.items():
        cpu, wall = (
            {tasks: one["tokens"] / one[key] for tasks, one in of.items()}
            for key in ("cpu_seconds", "seconds")
        )
        both = len(of) == 2
        rows.append((
            f"{n}", server, *(f"{cpu[one]:.1f}" if one in cpu else "" for one in ("one", "mixed")),
            *(f"{x['mixed'] / x['one']:.2f}" if both else "" for x in (cpu, wall)),
        ))  # fmt: skip
    header = ("clients", "server", "one adapter, tokens per CPU s", "all mixed",
              "mixed / one (goal 0.9)", "the same by the clients' seconds")  # fmt: skip
    return markdown(header, rows, left=2)


def rooms(read):
    """Every cell: its rate, first tokens, loads and evictions."""
    rows = []
    for (n, server, tasks, room), one in _cells(read).items():
        first = sorted(one["first_token_s"])
        at = [first[min(len(first) - 1, int(q * len(first)))] for q in (0.5, 0.99)]
        rows.append((
            f"{n}", f"{server}, {tasks}", f"{room}", f"{one['tokens'] / one['cpu_seconds']:.1f}",
            f"{one['tokens'] / one['seconds']:.1f}", *(f"{x:.1f}" for x in at),
            *(f"{one.get(key, 0)}" if "loads" in one else "" for key in ("loads", "evictions")),
            f"{one['cached_tokens'] / one['prompt_tokens']:.0%}" if "cached_tokens" in one else "",
        ))  # fmt: skip
    header = ("clients", "server, tasks", "room for", "tokens/CPU s", "tokens/s",
              "first token, median, s", "p99, s", "loads", "evictions",
              "prompt tokens kept")  # fmt: skip
    return markdown(header, rows, left=2)


def stress(read):
    """Outcomes of the requests so far and resources of the server, at some points of a run."""
    result = read("stress")
    rows, total = [], {}
    points = [result["start"], *result["rows"]]
    every = -(-len(points) // 8)
    for i, one in enumerate(points):
        for key, n in one.get("outcomes", {}).items():
            total[key] = total.get(key, 0) + n
        if i % every and one is not points[-1]:
            continue
        others = {key: n for key, n in total.items()
                  if key not in ("right", "left", "garbage", "reloaded")}  # fmt: skip
        rows.append((
            f"{sum(total.values()):,}",
            *(f"{total.get(key, 0):,}" for key in ("right", "left", "garbage", "reloaded")),
            ", ".join(f"{key}: {n}" for key, n in others.items()) or "0",
            f"{one['d2c_mlx_adapter_loads_total']:,}",
            f"{one['d2c_mlx_adapter_evictions_total']:,}", f"{one['resident_bytes'] / 1e6:.0f}",
            *(f"{one[key]}" for key in ("threads", "files", "sockets")),
        ))  # fmt: skip
    header = ("requests", "right answers", "clients that left", "garbage", "packs reloaded",
              "anything else", "loads of names still served", "their evictions", "resident MB",
              "threads", "files", "sockets")  # fmt: skip
    return markdown(header, rows, left=0)
