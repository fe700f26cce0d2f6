"""Routing that needs no probes, beside the router that is fitted on them.

    python -m benchmarks.serving.routers --library DIR --pack PACK [--tests 10]

*Arrow* (https://arxiv.org/abs/2405.11157): in every module each adapter's arrow is the top right
singular vector v of its dW, and an input x answers it by |v.x|. By prompt, the adapter that most
tokens in most modules answer best; by token, every token in every module has the adapters that it
answers there, weighted by the softmax of the best k. *Entropy* (as in TUNA,
https://arxiv.org/abs/2508.08165): of all adapters and the base model, the one that is surest of the
first token of the answer. *States* is `d2c-mlx route` (d2c_mlx/serve/router.py).

The loss is of held-out rows under what was chosen; seconds are the median of one prompt per task
until the choice is known, in which Arrow by token needs none.
"""

import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.serving.route import FOREIGN, prompts_of, routed_losses, share
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.serve.adapters import Adapters, RowAdapters
from d2c_mlx.serve.router import fit_router
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json


class ArrowLinear(nn.Module):
    """A linear module with the arrows of all adapters; counts votes, or mixes the best `k`."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear, self.k, self.votes = linear, 0, None
        self.n, width, self.rank = a.shape
        self.a = a.swapaxes(0, 1).reshape(width, -1)
        self.b = b.reshape(-1, b.shape[-1])
        # Of dW = b.T a.T the right singular vectors are q @ u, with q r = a and u of (r b).
        arrows = []
        for one, other in zip(np.array(a, np.float64), np.array(b, np.float64)):
            q, r = np.linalg.qr(one)
            arrows.append(q @ np.linalg.svd(r @ other, full_matrices=False)[0][:, 0])
        self.arrows = mx.array(np.stack(arrows, axis=1).astype(np.float32))

    def __call__(self, x):
        """The output of the base; votes are counted on the way."""
        y, answers = self.linear(x), mx.abs(x @ self.arrows)
        if not self.k:
            best = answers.argmax(axis=-1, keepdims=True) == mx.arange(self.n)
            self.votes = best.mean(axis=(0, 1))
            return y
        least = mx.topk(answers, self.k, axis=-1).min(axis=-1, keepdims=True)
        weights = mx.softmax(mx.where(answers >= least, answers, -mx.inf), axis=-1)
        return y + ((x @ self.a) * mx.repeat(weights, self.rank, axis=-1)) @ self.b


class Arrow:
    """A base model of its own with `ArrowLinear` wherever an adapter of the pack is."""

    def __init__(self, pack):
        self.base = Model()
        self.tasks = [tasks[0] for tasks in pack.adapters.values()]
        adapters = [pack.load(task) for task in self.tasks]
        linears = dict(self.base.model.named_modules())
        self.modules = {
            path: ArrowLinear(linears[path], *self.base.stacked_factors(path, adapters))
            for path in sorted({path for one in adapters for path in one.modules})
        }
        self.base.model.update_modules(tree_unflatten(list(self.modules.items())))

    def route(self, prompt):
        """The task with most votes."""
        self.base.model.model(mx.array([prompt]))
        votes = mx.stack([one.votes for one in self.modules.values()]).mean(axis=0)
        return self.tasks[int(votes.argmax())]

    def loss(self, tests, k):
        """Mean over tasks of the NLL per target token with every token's own adapters."""
        for one in self.modules.values():
            one.k = k
        found = []
        for test in tests:
            nll = 0.0
            for row in test.examples:
                tokens = mx.array([row.tokens])
                logits = self.base.model(tokens[:, :-1]).astype(mx.float32)
                nll += nn.losses.cross_entropy(logits, tokens[:, 1:])[0, row.offset - 1 :].sum()
            found.append(nll.item() / test.n_targets)
        for one in self.modules.values():
            one.k = 0
        return float(np.mean(found))


class Entropy:
    """All adapters of the pack and the base model, in one batch."""

    def __init__(self, pack):
        self.model = Adapters(Model(), pack, 1 << 40)
        self.tasks = [None, *(tasks[0] for tasks in pack.adapters.values())]
        entries = [self.model.names[task] for task in self.tasks[1:]]
        self.rows = [self.model.base_entry, *entries]

    def route(self, prompt):
        """The task of the adapter that is surest of the next token; None is the base model."""
        rows = mx.array([prompt] * len(self.tasks))
        layers = make_prompt_cache(self.model.base.model)
        cache = [*layers, RowAdapters(self.rows)]
        if len(prompt) > 1:
            self.model(rows[:, :-1], cache)
            mx.eval([one.state for one in layers])
        logits = self.model(rows[:, -1:], cache)[:, -1].astype(mx.float32)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logs) * logs).sum(axis=-1)
        return self.tasks[int(entropy.argmin())]


class States:
    """The fitted router, on a base model of its own: losses leave adapters on theirs."""

    def __init__(self, probes):
        self.base = Model()
        self.router = fit_router(self.base.model, probes)

    def route(self, prompt):
        """The task of the nearest direction, or None."""
        match = self.router.best(self.router.states(self.base.model, [prompt])[0])
        return match and match.task


def seconds(router, tests):
    """Median of one prompt per task, the first of which is not counted."""
    times = []
    for test in tests:
        prompt = prompts_of(test)[0]
        started = time.perf_counter()
        router.route(prompt)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def measure(router, base, pack, tests, foreign):
    """The choices of a router, and the loss under them."""
    found = {test.task: [router.route(x) for x in prompts_of(test)] for test in tests}
    keys = pack.tasks
    right = [t is not None and keys[t] == keys[task] for task, own in found.items() for t in own]
    loss, _ = routed_losses(base, pack, tests, found)
    return {
        "right": share(right),
        "to_the_base": share(t is None for own in found.values() for t in own),
        "foreign_accepted": share(router.route(prompt) is not None for prompt in foreign),
        "loss": loss,
    }


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__, "routers.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--tests", type=int, default=10)
    options = parser.parse_args()
    base, _, paths, probes = load_library(options.library, 10)
    pack = load_pack(options.pack)
    tests = [
        base.encode(path.name, load_task(options.library / "tasks" / path.name).test)
        for path in paths
    ]
    tests = [ExampleSet(one.task, one.examples[: options.tests]) for one in tests]
    rows = [{"prompt": prompt, "completion": "-"} for prompt in FOREIGN]
    foreign = prompts_of(base.encode("foreign", rows))
    result = {**environment(), "tasks": len(tests), "tests": options.tests,
              "adapters": len(pack.adapters), "routers": {}}  # fmt: skip
    arrow = Arrow(pack)
    routers = {"states": States(probes), "arrow by prompt": arrow, "entropy": Entropy(pack)}
    times = {name: {"seconds": seconds(one, tests)} for name, one in routers.items()}
    print(times, flush=True)
    labels = {test.task: [test.task] * len(test.examples) for test in tests}
    result["labelled_loss"] = routed_losses(base, pack, tests, labels)[1]
    for name, one in routers.items():
        result["routers"][name] = times[name] | measure(one, base, pack, tests, foreign)
        print(name, result["routers"][name], flush=True)
    for k in (1, 4):
        loss = arrow.loss(tests, min(k, len(pack.adapters)))
        result["routers"][f"arrow by token, {k}"] = {"loss": loss}
        print(k, loss, flush=True)
    write_json(options.output, result)


if __name__ == "__main__":
    main()
