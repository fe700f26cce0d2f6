"""Tables of exports in llama.cpp, and of routing. Each gets `read` of result_files.py."""

from benchmarks.tables.result_files import markdown


def gguf_lora(read):
    """Losses of the demo's adapters here and in llama.cpp, and differences of log-probabilities."""
    lines = [
        (name, f"{one['tokens']}", f"{one['ours']:.5f}", f"{one['llama_cpp']:.5f}",
         f"{one['mean_difference']:.5f}", f"{one['largest_difference']:.5f}")
        for name, one in read("gguf_lora")["rows"].items()
    ]  # fmt: skip
    header = ("weights, adapter", "tokens", "our loss", "llama.cpp's", "mean difference", "largest")
    return markdown(header, lines)


def gguf_families(read):
    """Exports of every family beside llama.cpp's converter and in llama.cpp."""
    keys = ("converter", "base", "adapter", "change")
    lines = [
        (family, *(f"{one[key]:.1e}" for key in keys))
        for family, one in read("gguf_families")["rows"].items()
    ]
    return markdown(("family", *keys), lines)


def gguf_budgets(read, file="gguf_budgets"):
    """Excess of packs and plain exports at equal bytes, a column for each budget."""
    rows = read(file)["rows"]
    budgets = sorted({one["budget"] for one in rows}, key=lambda x: -float(x.rstrip("%")))
    found = {}
    for one in rows:
        # LoRAQuant leaves its second part out where that does not fit.
        what = one["what"].partition(" bits")[0] + " bits" * ("LoRAQuant" in one["what"])
        tasks = f", {one['tasks']} tasks" if "tasks" in one else ""
        cell = f"{one['excess']:+.3f} ({one['nbytes'] / 1e6:.2f} MB{tasks})"
        found.setdefault(what, {})[one["budget"]] = cell
    lines = [(what, *(cells.get(b, "") for b in budgets)) for what, cells in found.items()]
    return markdown(("files", *budgets), lines)


def route(read, file="route"):
    """Routing: the task of each prompt, and what that costs."""
    one = read(file)
    right, base = one["routed_right"], one["to_the_base"]
    losses = [("loss of the 12.5 % pack, routed", "routed_loss"),
              ("loss, with labels", "labelled_loss")]  # fmt: skip
    return markdown((f"held-out prompts of {one['tasks']} tasks", ""), [
        ("sent to their task", f"{right:.1f}%"),
        ("to another task", f"{100 - right - base:.1f}%"),
        ("to the base model", f"{base:.1f}%"),
        *((words, f"{one[key]:.3f}") for words, key in losses if key in one),
        ("prompts of no task taken for one", f"{one['foreign_accepted']:.1f}%"),
        ("prompts of a task left out taken for another", f"{one['left_out_accepted']:.1f}%"),
        ("median time of routing a prompt", f"{1000 * one['route_seconds']:.1f} ms"),
        ("of its prefill", f"{1000 * one['prefill_seconds']:.1f} ms"),
    ])  # fmt: skip
