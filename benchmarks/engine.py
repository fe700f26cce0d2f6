"""The probe engine against the loop a user would write, PEFT on torch, and the machine.

One process, one set of rows, alternating repeats, medians. Every timing includes building graphs,
the evaluation and reading the losses back; for the mlx-lm loop also loading base and adapter, as
that loop does. Losses of all rows are compared. Prints tables and one JSON line.

    python benchmarks/engine.py --library ../shared/library
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import load_library, run  # first: the fast BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import dequantize_model, load

from d2c_mlx.batches import shared_prefix
from d2c_mlx.blas import limit_blas_threads
from d2c_mlx.convert import save_peft
from d2c_mlx.doctor import machine
from d2c_mlx.engine import Engine, Savings
from d2c_mlx.model import block_index

SWITCHES = ("head", "prefix", "batches", "streams", "exponentials")


def upper_blocks(adapter, first):
    """The adapter without its updates below block `first`, as mlx-lm's default trains them."""
    modules = {p: lora for p, lora in adapter.modules.items() if block_index(p) >= first}
    return type(adapter)(adapter.name, modules)


def timed(body, repeats):
    """`(median seconds, result)` of `repeats` calls after one to warm up."""
    result = body()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = body()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def mlx_lm_loop(base, directories, sets, dequantize):
    """Load the base with each adapter; one forward per example, full logits; mlx-lm's own loss."""
    values = []
    for directory in directories:
        model, _ = load(str(base.path), adapter_path=str(directory))
        if dequantize:
            model.set_dtype(mx.float32)
            model = dequantize_model(model)
            mx.eval(model.parameters())
        for one in sets:
            total = 0.0
            for row in one.examples:
                logits = model(mx.array([row.tokens[:-1]]))[0].astype(mx.float32)
                nll = nn.losses.cross_entropy(logits, mx.array(row.tokens[1:]))
                total += nll[row.first_target - 1 :].sum().item()
            values.append(total)
    return values


def torch_model(base, paths, directory):
    """The same float32 weights in transformers, every adapter loaded under its name."""
    import shutil

    from mlx_lm.utils import save_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, _ = load(str(base.path), lazy=True)
    model.set_dtype(mx.float32)
    save_model(directory, dequantize_model(model))
    config = json.loads((base.path / "config.json").read_text())
    del config["quantization"]
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copyfile(base.path / "tokenizer_config.json", directory / "tokenizer_config.json")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    model = PeftModel.from_pretrained(model, paths[0], adapter_name=paths[0].name)
    for path in paths[1:]:
        model.load_adapter(path, adapter_name=path.name)
    return model.eval()


def peft_loop(model, names, sets):
    """`set_adapter`, padded batches of 16 over all rows of all tasks, inference mode."""
    import torch

    rows = [(k, row) for k, one in enumerate(sets) for row in one.examples]
    values = []
    with torch.inference_mode():
        for name in names:
            model.set_adapter(name)
            totals = np.zeros(len(sets))
            for start in range(0, len(rows), 16):
                batch = rows[start : start + 16]
                width = max(len(row.tokens) for _, row in batch)
                ids, mask = np.zeros((2, len(batch), width), np.int64)
                labels = np.full((len(batch), width), -100)
                for i, (_, row) in enumerate(batch):
                    n = len(row.tokens)
                    ids[i, :n], mask[i, :n] = row.tokens, 1
                    labels[i, row.first_target : n] = row.tokens[row.first_target :]
                ids, mask, labels = map(torch.from_numpy, (ids, mask, labels))
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
                nll = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), labels[:, 1:], reduction="none"
                )
                for (k, _), one in zip(batch, nll.sum(dim=1).tolist()):
                    totals[k] += one
            values += totals.tolist()
    return values


def matmul_rate(repeats):
    """FLOP/s of a plain float32 matmul on all cores, shapes of this model's MLP and square."""
    import os

    limit_blas_threads(os.cpu_count())
    best = 0.0
    for m, k, n in ((430, 576, 1536), (2048, 2048, 2048)):
        a, b = mx.random.normal((m, k)), mx.random.normal((k, n))
        mx.eval(a, b)
        calls = max(1, int(4e10 / (2 * m * k * n)))

        def body(a=a, b=b, calls=calls):
            for _ in range(calls):
                mx.eval(a @ b)

        seconds, _ = timed(body, repeats)
        best = max(best, 2 * m * k * n * calls / seconds)
    return best


def useful_flops(base, sets):
    """2 x parameters x needed tokens, each once; the head at targets only."""
    body = sum(width * out for width, out in base.module_shapes.values())
    hidden, vocabulary = base.dimensions
    needed = 0
    for one in sets:
        n_prefix = len(shared_prefix(one))
        needed += n_prefix + sum(len(row.tokens) - 1 - n_prefix for row in one.examples)
    return 2 * (needed * body + sum(one.n_targets for one in sets) * hidden * vocabulary)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=2, help="adapters that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--four-bit", action="store_true", help="the mlx-lm loop on the model as"
                        " stored too: one row, minutes on a CPU")  # fmt: skip
    options = parser.parse_args()
    base, adapters, paths, sets = load_library(options.library, options.examples)
    adapters, paths = adapters[: options.adapters], paths[: options.adapters]
    pieces = [(adapter, one) for adapter in adapters for one in sets]
    n_tokens = len(adapters) * sum(one.n_tokens for one in sets)
    seconds, values, rows = {}, {}, []

    def record(name, body, repeats):
        seconds[name], values[name] = timed(body, repeats)
        difference = np.array(values[name]) - np.array(values["d2c-mlx"])
        worst = np.abs(difference / [one.n_targets for _, one in pieces]).max()
        rows.append((name, n_tokens / seconds[name], seconds[name] / seconds["d2c-mlx"], worst))

    record("d2c-mlx", lambda: run(Engine(base), pieces), options.repeats)
    for name in SWITCHES:
        engine = Engine(base, savings=Savings(**{name: False}))
        record(f"without {name}", lambda e=engine: run(e, pieces), 1)
    values_of_all = values["d2c-mlx"]
    last16 = [(upper_blocks(adapter, base.n_layers - 16), one) for adapter, one in pieces]
    values["d2c-mlx"] = run(Engine(base, savings=Savings(frozen=False)), last16)
    for name, frozen in (("last 16 blocks only", True), ("the same without frozen", False)):
        engine = Engine(base, savings=Savings(frozen=frozen))
        record(name, lambda e=engine: run(e, last16), 1)
    values["d2c-mlx"] = values_of_all
    for name, more in (("stack 2", {"stack": 2}), ("compile", {"compile": True})):
        engine = Engine(base, savings=Savings(**more))
        record(name, lambda e=engine: run(e, pieces), 1)
    Engine(base, savings=Savings(streams=False, exponentials=False))  # stock SwiGLU, all cores
    with tempfile.TemporaryDirectory() as directory:
        stock = []
        for adapter in adapters:
            stock.append(Path(directory) / "mlx" / adapter.name)
            adapter.save(stock[-1], base.n_layers)
        record("mlx-lm loop, float32", lambda: mlx_lm_loop(base, stock, sets, True), 1)
        if options.four_bit:
            one = type(sets[0])(sets[0].task, sets[0].examples[:1])
            started = time.perf_counter()
            mlx_lm_loop(base, stock[:1], [one], False)
            took = (time.perf_counter() - started) / one.n_tokens * n_tokens
            seconds["mlx-lm loop, 4 bit"] = took
            rows.append(("mlx-lm loop, 4 bit", n_tokens / took, took / seconds["d2c-mlx"], np.nan))
        mx.clear_cache()
        for adapter in adapters:
            save_peft(adapter, Path(directory) / "peft" / adapter.name)
        (Path(directory) / "base").mkdir()
        peft = [Path(directory) / "peft" / adapter.name for adapter in adapters]
        model = torch_model(base, peft, Path(directory) / "base")
        names = [path.name for path in peft]
        record("PEFT on torch", lambda: peft_loop(model, names, sets), options.repeats)
    record("d2c-mlx again", lambda: run(Engine(base), pieces), options.repeats)
    rate = matmul_rate(options.repeats)
    useful = len(adapters) * useful_flops(base, sets) / seconds["d2c-mlx"]
    print("| evaluation | tokens/s | seconds / d2c-mlx's | largest difference (nats per token) |")
    print("|---|--:|--:|--:|")
    for name, speed, ratio, worst in rows:
        print(f"| {name} | {speed:.0f} | {ratio:.2f} | {worst:.1e} |")
    print(f"\nuseful {useful / 1e9:.0f} GFLOP/s of {rate / 1e9:.0f} (plain matmul): "
          f"{useful / rate:.0%}")  # fmt: skip
    result = {"seconds": seconds, "n_tokens": n_tokens, "useful_flops": useful}
    print(json.dumps({**result, "matmul_flops": rate, "machine": machine()}))


if __name__ == "__main__":
    main()
