"""Attribution: what each module of an adapter contributes to its gain, by integrated gradients."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import batches_by_length, pad_batch
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.forward import find_head, full_logits, run_blocks
from d2c_mlx.models.kernels import target_scores
from d2c_mlx.utils.device import arithmetic, on_cpu
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.files import fingerprint

__all__ = ["POINTS", "module_gains"]

# Scales of the adapter at which derivatives are taken. A small pack is near the base; near the
# whole adapter the loss of ten rows is flat, and its derivatives are noise. More points cost more
# and say the same (benchmarks/notes/2026-11-29-estimates.md).
POINTS = (0.2,)
# Padded tokens whose activations are kept at a time.
_BATCH = 512


def module_gains(
    base: BaseModel,
    adapter: Adapter,
    examples: ExampleSet,
    points: Sequence[float] = POINTS,
    cache: LossCache | None = None,
) -> dict[str, float]:
    """How much each module of an adapter lowers the loss, in nats per target token.

    All modules are scaled together from 0 (the base model) to 1. The fall of the loss along the way
    is the integral of its derivatives by the scales of the modules, so over points of the whole way
    the gains add up to `NLL(base) - NLL(adapter)`. A planner weighs bytes by them.

    Args:
        base: the base model.
        adapter: the adapter of the examples' task.
        examples: rows on which the loss is measured.
        points: scales between 0 and 1 whose derivatives are averaged.
        cache: has the gains of earlier calls, and gets these; None computes them anew.

    Returns:
        Module path -> gain; below 0 where a module does harm.

    Source: Integrated Gradients, https://arxiv.org/abs/1703.01365.
    """
    about = [
        list(points),
        base.fingerprint,
        [*arithmetic().values()],
        adapter.digest,
        examples.digest,
    ]
    keys = {path: fingerprint([*about, path])[:32] for path in sorted(adapter.modules)}
    cached = {path: cache.get(key) for path, key in keys.items()} if cache else {}
    if cached and None not in cached.values():
        return {path: gain for path, gain in cached.items() if gain is not None}
    with base.attached(adapter):
        gains = _integrated(base, examples, points)
    if cache:
        for path, key in keys.items():
            cache.put(key, gains[path])
    return gains


def _integrated(base: BaseModel, examples: ExampleSet, points: Sequence[float]) -> dict[str, float]:
    """The gains of the modules of the attached adapter."""
    head = find_head(base.model)
    factors = base.attached_factors
    fast = on_cpu()

    def loss(scales: mx.array, batch: Sequence[Example]) -> mx.array:
        x, places, targets = pad_batch(batch)
        scaled = [(a, b * s.astype(b.dtype)) for (a, b), s in zip(factors.values(), scales)]
        with base.replaced_factors(scaled):
            if head:
                logits = head(run_blocks(base.model, x)[places])
            else:
                logits = full_logits(base.model, x)[places]
        normaliser, gold = target_scores(logits, targets, fast)
        return (normaliser - gold).sum()

    rows = examples.examples
    gains = np.zeros(len(factors))
    with all_cores():
        for batch in batches_by_length([len(row.tokens) for row in rows], _BATCH):
            members = [rows[i] for i in batch]
            for x in points:
                gradient = mx.grad(loss)(mx.full(len(factors), x), members)
                gains -= np.array(gradient, np.float64)
    return dict(zip(factors, (gains / (len(points) * examples.n_targets)).tolist()))
