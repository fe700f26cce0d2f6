"""Train LoRA adapters with PEFT on torch: one directory per task, for libraries to measure on.

    python -m benchmarks.library.train --tasks DIR --output DIR --names gec-en,qa-es [--rank 32]
    python -m benchmarks.library.train --tasks DIR --output DIR --recipe FILE   # recipe.yaml

A recipe has a line per adapter with settings of its own; `--names` takes some of them. Reads
`<task>/train.jsonl` and judges by `<task>/test.jsonl`, before and after. One adapter at a
time; a stopped run continues with the first one that is missing. `training.jsonl` in the output has
a line for every adapter; one that does not beat the base says so. Seconds are those of training.
`--result FILE` gets the same lines with the SHA-256 of every adapter's weights.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from benchmarks import command_line
from benchmarks.stock_models import torch_base
from d2c_mlx.models.model import Model
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import hash_file, write_dir, write_json


def batches(examples, n_tokens, seed):
    """Yield batches of at most so many tokens, padding counted, without end."""
    shuffled = random.Random(seed)
    while True:
        order = list(range(len(examples)))
        shuffled.shuffle(order)
        # Alike lengths share a batch, but only of 64 rows at a time, so that batches stay random.
        for start in range(0, len(order), 64):
            some = sorted(order[start : start + 64], key=lambda i: len(examples[i].tokens))
            yield from (
                [examples[i] for i in batch] for batch in cut(some, examples, n_tokens, shuffled)
            )


def cut(order, examples, n_tokens, shuffled):
    """Cut rows of rising length into batches; batches shuffled."""
    found = [[]]
    for i in order:
        if found[-1] and (len(found[-1]) + 1) * len(examples[i].tokens) > n_tokens:
            found.append([])
        found[-1].append(i)
    shuffled.shuffle(found)
    return found


def target_loss(model, batch):
    """Sum of the targets' NLL, and their number; the head on targets only."""
    width = max(len(one.tokens) for one in batch)
    ids, mask = torch.zeros((2, len(batch), width), dtype=torch.long)
    targets = torch.zeros((len(batch), width - 1), dtype=torch.bool)
    for i, one in enumerate(batch):
        n = len(one.tokens)
        ids[i, :n], mask[i, :n] = torch.tensor(one.tokens), 1
        targets[i, one.first_target - 1 : n - 1] = True
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][targets]
    wanted = ids[:, 1:][targets]
    logits = inner.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"), len(wanted)


def mean_loss(model, examples):
    """Mean NLL per target token, in nats."""
    with torch.inference_mode():
        parts = [target_loss(model, examples[i : i + 16]) for i in range(0, len(examples), 16)]
    return float(sum(loss for loss, _ in parts)) / sum(n for _, n in parts)


def quick_dtype():
    """bfloat16 where the CPU multiplies it.

    Elsewhere torch takes far longer for it than for float32: 45 seconds a step and 2, on one core
    of an AMD EPYC (Zen 3), torch 2.13. An older torch does not say what there is: float32.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if known.get("avx512_bf16") else "float32"


def train(model, examples, options):
    """AdamW with a warm-up and a cosine; returns the tokens seen."""
    weights = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0)
    seen, source = 0, batches(examples, options.tokens, options.seed)
    for step in range(options.steps):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / options.steps)) / 2
        optimiser.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 10) * cosine
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss, n = target_loss(model, batch)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seen += sum(len(one.tokens) for one in batch)
    return seen


def lora_config(options, n_layers):
    """PEFT's config; `q,k,v,o` are the modules of attention, layers are counted from the end."""
    # PEFT takes no layers beside its "all-linear", which is these seven of a llama.
    targets = options.targets.replace("all-linear", "q,k,v,o,gate,up,down")
    targets = [f"{one.removesuffix('_proj')}_proj" for one in targets.split(",")]
    last = None if options.layers == "all" else int(options.layers)
    return LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=targets, use_rslora=options.rslora, use_dora=options.dora,
        layers_to_transform=last and list(range(n_layers - last, n_layers)),
    )  # fmt: skip


def adapt(base, model, task, options):
    """Train and save one adapter; returns its line of the log."""
    train_rows, test_rows = (
        base.encode(task.name, [json.loads(row) for row in open(task / f"{split}.jsonl")]).examples
        for split in ("train", "test")
    )
    torch.manual_seed(options.seed)
    adapted = get_peft_model(model, lora_config(options, base.n_layers))
    with adapted.disable_adapter():
        before = mean_loss(adapted, test_rows[: options.tests])
    started = time.perf_counter()
    seen = train(adapted, train_rows, options)
    seconds = time.perf_counter() - started
    after = mean_loss(adapted, test_rows[: options.tests])
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    adapted.peft_config["default"].base_model_name_or_path = base.name
    with write_dir(options.output / "adapters" / task.name) as directory:
        adapted.save_pretrained(directory)
    adapted.unload()
    settings = ("rank", "alpha", "targets", "rslora", "layers", "steps", "seed", "dtype")
    return {
        "name": task.name, **{name: getattr(options, name) for name in settings},
        "rows": len(train_rows), "tokens": seen,
        "base": round(before, 4), "loss": round(after, 4), "beats_base": after < before,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def parse():
    """The options."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--recipe", type=Path, help="YAML with settings of every adapter")
    parser.add_argument("--names", help="tasks, separated by commas; default: the recipe's")
    parser.add_argument("--result", type=Path, help="JSON file of all lines and hashes")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--targets", default="all-linear", help="or modules, with commas")
    parser.add_argument("--rslora", action="store_true")
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--layers", default="all", help="or a number, counted from the end")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--tokens", type=int, default=320, help="of a batch")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=quick_dtype(),
                        help="of products  [default here: %(default)s]")  # fmt: skip
    options = parser.parse_args()
    if not options.recipe and not options.names:
        parser.error("--names or --recipe is needed")
    return options


def jobs(options):
    """`(name, options)` of every adapter."""
    own = {}
    if options.recipe:
        lines = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))["adapters"]
        own = {line["task"]: line for line in lines}
    for name in options.names.split(",") if options.names else own:
        yield name, argparse.Namespace(**vars(options) | own.get(name, {}))


def manifest(output):
    """All lines of a library's log, with hashes."""
    rows = [json.loads(line) for line in open(output / "training.jsonl", encoding="utf-8")]
    for row in rows:
        file = output / "adapters" / row["name"] / "adapter_model.safetensors"
        row["sha256"] = hash_file(file)
    return {"machine": machine(), "rows": rows}


def main():
    """Train what is missing."""
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    base = Model(options.model)
    with tempfile.TemporaryDirectory() as directory:
        model = torch_base(base, Path(directory))
    for name, some in jobs(options):
        if (options.output / "adapters" / name).exists():
            continue
        line = adapt(base, model, options.tasks / name, some)
        with open(options.output / "training.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    if options.result:
        write_json(options.result, manifest(options.output))


if __name__ == "__main__":
    main()
