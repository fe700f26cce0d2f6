"""Losses of an engine, and by the plain loop."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import scipy.special
from mlx.utils import tree_unflatten
from mlx_lm.generate import generate_step

from d2c_mlx.utils.device import current_device


def sum_nll(model, examples):
    """NLL of all target tokens by stock mlx-lm, one row at a time, the softmax in float64."""
    total = 0.0
    for example in examples.examples:
        logits = np.array(model(mx.array([example.tokens[:-1]]))[0].astype(mx.float32), np.float64)
        nll = scipy.special.logsumexp(logits, axis=-1)
        nll -= logits[np.arange(len(nll)), list(example.tokens[1:])]
        total += nll[example.first_target - 1 :].sum()
    return total


def plain_loss(base, adapter, examples):
    base.attach(adapter)
    return sum_nll(base.model, examples)


def greedy(model, tokenizer, prompt, n):
    """The most likely tokens by stock mlx-lm, up to and with an end token."""
    tokens, stream = [], mx.default_stream(current_device())
    for token, _ in generate_step(mx.array(list(prompt)), model, stream, max_tokens=n):
        tokens.append(int(token))
        if token in tokenizer.eos_token_ids:
            break
    return tuple(tokens)


def losses_of(engine, pieces):
    return [float(rows.sum()) for _, rows in sorted(engine.run(pieces), key=lambda x: x[0])]


def output_derivatives(model, path, width, examples):
    """`(n_tokens, width)` of the summed NLL by a module's outputs, float64; one row at a time."""
    module, derivatives = dict(model.named_modules())[path], []
    for example in examples.examples:
        tokens, first = mx.array([example.tokens]), example.first_target

        def nll(shift, tokens=tokens, first=first):
            shifted = nn.Sequential(module, lambda outputs: outputs + shift)
            model.update_modules(tree_unflatten([(path, shifted)]))
            losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
            return losses[:, first - 1 :].sum()

        by_token = mx.grad(nll)(mx.zeros((tokens.size - 1, width)))
        derivatives.append(np.array(by_token, np.float64))
    model.update_modules(tree_unflatten([(path, module)]))
    return np.concatenate(derivatives)
