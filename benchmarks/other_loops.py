"""The loops that the engine is compared with: mlx-lm's, the plain one and PEFT's."""

import mlx.core as mx
import numpy as np
import torch

from benchmarks.speed.stock_loop import load_mlx_lm, mlx_lm_rows


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


def peft_loop(model, names, sets, exact=False):
    """`set_adapter`, padded batches of 16 over all rows of all tasks, inference mode.

    torch's float32 cross entropy over 49,152 entries is off by 1e-4; `exact` takes it in float64.
    """
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
