"""The loops that the engine is compared with: mlx-lm's and PEFT's, as a user would write them.

As a script it runs mlx-lm's in a process of its own, which knows nothing of d2c-mlx and its BLAS:

    python benchmarks/loops.py BASE ADAPTER_DIRECTORY ROWS.json [--float32]
"""

import json
import shutil
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import dequantize_model, load, save_model


def load_mlx_lm(base, adapter, float32):
    """The base with an adapter, in float32 or as stored."""
    model, _ = load(str(base), adapter_path=str(adapter))
    if float32:
        model.set_dtype(mx.float32)
        model = dequantize_model(model)
        mx.eval(model.parameters())
    return model


def mlx_lm_rows(model, rows):
    """One forward per example, full logits, mlx-lm's own loss; rows are (tokens, first target)."""
    for tokens, first in rows:
        logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
        nll = nn.losses.cross_entropy(logits, mx.array(tokens[1:]))
        yield nll[first - 1 :].sum().item()


def mlx_lm_loop(base, directories, sets):
    """NLL sums: the base is loaded with each adapter, in float32."""
    values = []
    for directory in directories:
        model = load_mlx_lm(base, directory, True)
        for one in sets:
            rows = [(row.tokens, row.first_target) for row in one.examples]
            values.append(sum(mlx_lm_rows(model, rows)))
    return values


def plain_loop(base, adapters, sets):
    """NLL sums by the model's own full logits, one example at a time, in float64 from there on."""
    values = []
    for adapter in adapters:
        base.attach(adapter)
        for one in sets:
            total = 0.0
            for row in one.examples:
                logits = np.array(base.model(mx.array([row.tokens[:-1]]))[0], np.float64)
                logits, targets = logits[row.first_target - 1 :], row.tokens[row.first_target :]
                top = logits.max(axis=1)
                normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
                total += float((normaliser - logits[np.arange(len(targets)), targets]).sum())
            values.append(total)
    return values


def float32_base(base, directory):
    """Write the base as an mlx-lm directory with float32 weights, none quantized."""
    model, _ = load(str(base.path), lazy=True)
    model.set_dtype(mx.float32)
    save_model(directory, dequantize_model(model))
    config = json.loads((base.path / "config.json").read_text())
    config.pop("quantization", None)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base.path / name).exists():
            shutil.copyfile(base.path / name, directory / name)


def torch_base(base, directory):
    """The same float32 weights in transformers."""
    from transformers import AutoModelForCausalLM

    float32_base(base, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32")


def torch_model(base, paths, directory):
    """The float32 base in PEFT, every adapter loaded under its name."""
    from peft import PeftModel

    model = torch_base(base, directory)
    model = PeftModel.from_pretrained(model, paths[0], adapter_name=paths[0].name)
    for path in paths[1:]:
        model.load_adapter(path, adapter_name=path.name)
    return model.eval()


def peft_loop(model, names, sets, exact=False):
    """`set_adapter`, padded batches of 16 over all rows of all tasks, inference mode.

    torch's float32 cross entropy over 49,152 entries is off by 1e-4; `exact` takes it in float64.
    """
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
                logits = logits.double() if exact else logits
                nll = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), labels[:, 1:], reduction="none"
                )
                for (k, _), one in zip(batch, nll.sum(dim=1).tolist()):
                    totals[k] += one
            values += totals.tolist()
    return values


def main():
    """Print seconds of loading, seconds and tokens of the rows."""
    base, adapter, rows_file, *flags = sys.argv[1:]
    with open(rows_file, encoding="utf-8") as file:
        rows = json.load(file)
    started = time.perf_counter()
    model = load_mlx_lm(base, adapter, "--float32" in flags)
    mx.eval(model.parameters())
    loaded = time.perf_counter()
    list(mlx_lm_rows(model, rows))
    tokens = sum(len(tokens) for tokens, _ in rows)
    print(json.dumps([loaded - started, time.perf_counter() - loaded, tokens]))


if __name__ == "__main__":
    main()
