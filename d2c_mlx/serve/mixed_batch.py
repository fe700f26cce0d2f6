"""One base model, and a batch in which each row has an adapter of its own.

Adapters in memory are stacked per module, one in each slot; each row takes its factors from the
stack (S-LoRA, https://arxiv.org/abs/2311.03285; here by `mx.gather_mm`).

Which adapter a row has is one more entry of its prompt cache, not a table beside the batch:
mlx-lm's batch generator merges, filters and splits caches itself, so a row cannot get another's
adapter, and nothing of mlx-lm's is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.base_model import BaseModel

__all__ = ["Factors", "MixedModel", "RowAdapters"]

# Module path -> `a (1, in, r)` and `b (1, r, out)` of an adapter.
Factors = Mapping[str, tuple[mx.array, mx.array]]


class RowAdapters:
    """The adapter of every row of a batch, as an entry of an mlx-lm prompt cache.

    Attributes:
        rows: for each row, the adapter's slot, 0 for the base model, and the scale of its update.
    """

    nbytes = 0
    state = ()

    def __init__(self, rows: Sequence[tuple[int, float]]) -> None:
        self.rows = list(rows)

    @classmethod
    def merge(cls, caches: Sequence[RowAdapters]) -> RowAdapters:
        """The entry of the batch that these batches make, one after the other."""
        return cls([row for one in caches for row in one.rows])

    def extend(self, other: RowAdapters) -> None:
        """Append the rows of another batch."""
        self.rows += other.rows

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.rows = [self.rows[i] for i in keep]

    def extract(self, row: int) -> RowAdapters:
        """The entry of one row alone."""
        return RowAdapters([self.rows[row]])

    def prepare(self, **_padding: object) -> None:
        """Do nothing: padding changes no adapter."""

    def finalize(self) -> None:
        """Do nothing: the end of padding changes no adapter either."""


class _ActiveRows:
    """Slots and scales of the batch that runs: one for all rows, or one for each, `(rows,)`."""

    slots: int | mx.array = 0
    scales: float | mx.array = 1.0

    def set(self, rows: Sequence[tuple[int, float]]) -> None:
        slots, scales = zip(*rows)
        self.slots = slots[0] if len(set(slots)) == 1 else mx.array(slots)
        # For rows of a module's `(rows, length, r)`.
        same = len(set(scales)) == 1
        self.scales = scales[0] if same else mx.array(scales, mx.float32)[:, None, None]

    def scaled(self, x: mx.array) -> mx.array:
        if isinstance(self.scales, float) and self.scales == 1:
            return x
        return (x * self.scales).astype(x.dtype)


class _MixedLoRA(nn.Module):
    """`linear(x) + scale * (x @ a[slot]) @ b[slot]`, `a (slots, in, r)` and `b (slots, r, out)`."""

    def __init__(self, linear: nn.Module, shape: tuple[int, int], active: _ActiveRows) -> None:
        super().__init__()
        self.linear, self.active = linear, active
        self.a, self.b = mx.zeros((1, shape[0], 0)), mx.zeros((1, 0, shape[1]))

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.active.slots
        if isinstance(slots, int):
            if not slots:
                return y
            update = self.active.scaled(x @ self.a[slots]) @ self.b[slots]
        else:
            update = self.active.scaled(mx.gather_mm(x, self.a, rhs_indices=slots))
            update = mx.gather_mm(update, self.b, rhs_indices=slots)
        return y + update.astype(y.dtype)

    def put(
        self, n_slots: int, rank: int, rows: Mapping[int, tuple[mx.array, mx.array] | None]
    ) -> None:
        """Give the stacks so many slots of a rank, and some new factors; None is no update."""
        dtype = next((one[0].dtype for one in rows.values() if one), self.a.dtype)
        more, wider = max(0, n_slots - self.a.shape[0]), max(0, rank - self.a.shape[2])
        a = mx.pad(self.a[..., :rank].astype(dtype), [(0, more), (0, 0), (0, wider)])
        b = mx.pad(self.b[:, :rank].astype(dtype), [(0, more), (0, wider), (0, 0)])
        for slot, one in rows.items():
            pad = rank - one[0].shape[2] if one else 0
            a[slot] = mx.pad(one[0][0], [(0, 0), (0, pad)]) if one else mx.zeros_like(a[slot])
            b[slot] = mx.pad(one[1][0], [(0, pad), (0, 0)]) if one else mx.zeros_like(b[slot])
        self.a, self.b = a, b


class MixedModel:
    """A base model with adapters in slots.

    Call it like an mlx-lm model, with caches made by `cache`. For one adapter at a time use
    `serve.load`, which needs less memory.

    Attributes:
        base: the model that it runs; its linear modules are replaced.
    """

    def __init__(self, base: BaseModel) -> None:
        """Take a base without adapters, which is not to be used for anything else then."""
        self.base = base
        self._active = _ActiveRows()
        self._modules: dict[str, _MixedLoRA] = {}
        self._n_slots, self._free = 1, list[int]()
        # Slot that is taken -> rank of each of its modules.
        self._ranks: dict[int, Mapping[str, int]] = {}

    def factors(self, adapter: Adapter) -> Factors:
        """Make the factors of an adapter; a thread of its own may, while this model runs."""
        found = {path: self.base.stacked_factors(path, [adapter]) for path in adapter.modules}
        mx.eval(list(found.values()))
        return found

    def put(self, adapters: Sequence[Factors]) -> list[int]:
        """Put adapters into slots; returns the slot of each."""
        slots = []
        for one in adapters:
            if not self._free:
                self._free.append(self._n_slots)
                self._n_slots += 1
            slots.append(self._free.pop(0))
            self._ranks[slots[-1]] = _ranks_of(one)
        self._wrap({path for one in adapters for path in one})
        rank = self._highest_ranks()
        for path, module in self._modules.items():
            rows = {k: one.get(path) for k, one in zip(slots, adapters)}
            module.put(self._n_slots, rank.get(path, 0), rows)
        self._evaluate()
        return slots

    def free(self, slot: int) -> None:
        """Give a slot back; no row may have it any more. Its memory is kept for the next."""
        self._free = sorted([*self._free, slot])
        del self._ranks[slot]

    def move(self, slot: int) -> int:
        """Move what no row has to the lowest slot that is free, which is returned."""
        to = self._free.pop(0)
        for module in self._modules.values():
            module.a[to], module.b[to] = module.a[slot], module.b[slot]
        self._evaluate()
        self._ranks[to] = self._ranks[slot]
        self.free(slot)
        return to

    def trim(self, most: int) -> None:
        """Give memory back of free slots above this number."""
        kept = self._n_slots
        while kept - 1 > most and kept - 1 in self._free:
            kept -= 1
        if kept == self._n_slots:
            return
        self._n_slots, self._free = kept, [slot for slot in self._free if slot < kept]
        for module in self._modules.values():
            # A slice would keep the whole.
            module.a = mx.take(module.a, mx.arange(kept), axis=0)
            module.b = mx.take(module.b, mx.arange(kept), axis=0)
        self._evaluate()

    def slot_nbytes(self, factors: Factors | None = None) -> int:
        """Bytes of one slot beside those that are taken, as they would be with this adapter."""
        return (
            sum(
                rank * sum(self.base.module_shapes[path])
                for path, rank in self._highest_ranks(factors or {}).items()
            )
            * self.base.compute_dtype.size
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.nbytes for module in self._modules.values() for x in (module.a, module.b))

    def cache(self, slot: int, scale: float = 1.0, layers: Sequence[Any] = ()) -> list[Any]:
        """A prompt cache for one sequence: the adapter's slot, a factor of its update.

        It has what `layers` has, which this adapter made at this scale; else it is empty.
        """
        return [*(layers or make_prompt_cache(self.base.model)), RowAdapters([(slot, scale)])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        self._active.set(rows.rows)
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # The router runs the inner model directly, as the base.
            self._active.set([(0, 1.0)])

    def _wrap(self, paths: set[str]) -> None:
        """Replace linear modules that get their first adapter."""
        linears = dict(self.base.model.named_modules())
        new = {
            path: _MixedLoRA(linears[path], self.base.module_shapes[path], self._active)
            for path in sorted(paths - self._modules.keys())
        }
        self.base.model.update_modules(tree_unflatten(list(new.items())))
        self._modules |= new
        for path in new:
            self._modules[path].put(self._n_slots, 0, {})

    def _highest_ranks(self, *more: Factors) -> dict[str, int]:
        """The highest rank of each module in the slots that are taken, and in more adapters."""
        highest: dict[str, int] = {}
        for ranks in (*self._ranks.values(), *map(_ranks_of, more)):
            for path, rank in ranks.items():
                highest[path] = max(highest.get(path, 0), rank)
        return highest

    def _evaluate(self) -> None:
        mx.eval([(module.a, module.b) for module in self._modules.values()])


def _ranks_of(factors: Factors) -> dict[str, int]:
    return {path: a.shape[2] for path, (a, _) in factors.items()}
