"""One base model, and a batch in which each row has an adapter of its own.

All adapters of a pack are in memory at once, stacked per module; each row takes its factors from
the stack (S-LoRA, https://arxiv.org/abs/2311.03285; here by `mx.gather_mm`).

Which adapter a row has is one more entry of its prompt cache, not a table beside the batch:
mlx-lm's batch generator merges, filters and splits caches itself, so a row cannot get another's
adapter, and nothing of mlx-lm's is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.pack import Pack

__all__ = ["MixedModel", "RowAdapters"]


class RowAdapters:
    """The adapter of every row of a batch, as an entry of an mlx-lm prompt cache.

    Attributes:
        slots: for each row, the adapter's position in the stack; 0 is the base model.
    """

    nbytes = 0
    state = ()

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = list(slots)

    @classmethod
    def merge(cls, caches: Sequence[RowAdapters]) -> RowAdapters:
        """The entry of the batch that these batches make, one after the other."""
        return cls([slot for one in caches for slot in one.slots])

    def extend(self, other: RowAdapters) -> None:
        """Append the rows of another batch."""
        self.slots += other.slots

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.slots = [self.slots[i] for i in keep]

    def extract(self, row: int) -> RowAdapters:
        """The entry of one row alone."""
        return RowAdapters([self.slots[row]])

    def prepare(self, **_padding: object) -> None:
        """Do nothing: padding changes no adapter."""

    def finalize(self) -> None:
        """Do nothing: the end of padding changes no adapter either."""


class _ActiveSlots:
    """Slots of the batch that runs: one for all rows, or one for each, `(rows,)`."""

    slots: int | mx.array = 0


class _MixedLoRA(nn.Module):
    """`linear(x) + (x @ a[slot]) @ b[slot]` with `a (slots, in, r)` and `b (slots, r, out)`."""

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array, active: _ActiveSlots) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.active = linear, a, b, active

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.active.slots
        if isinstance(slots, int):
            if not slots:
                return y
            update = (x @ self.a[slots]) @ self.b[slots]
        else:
            update = mx.gather_mm(x, self.a, rhs_indices=slots)
            update = mx.gather_mm(update, self.b, rhs_indices=slots)
        return y + update.astype(y.dtype)


class MixedModel:
    """A pack on its base model, with all adapters in memory.

    Call it like an mlx-lm model, with caches made by `cache`. For one adapter at a time use
    `serve.load`, which needs less memory.

    Attributes:
        base: the model that it runs; its linear modules are replaced.
        nbytes: bytes of all adapters in memory.
    """

    def __init__(self, base: BaseModel, pack: Pack) -> None:
        """Load all adapters.

        Args:
            base: the pack's base model without adapters; not to be used for anything else then.
            pack: verified.

        Raises:
            AdapterError: an adapter is not of this base.
            PackError: an adapter cannot be read.
        """
        self.base = base
        keys = list(pack.adapters)
        adapters = [pack.load(tasks[0]) for tasks in pack.adapters.values()]
        for one in adapters:
            if one:
                check_adapter(one, base.module_shapes, pack.path)
        self._slots = {task: 0 if key is None else 1 + keys.index(key)
                       for task, key in pack.tasks.items()}  # fmt: skip
        self._active = _ActiveSlots()
        linears = dict(base.model.named_modules())
        modules = {}
        for path in sorted({path for one in adapters if one for path in one.modules}):
            a, b = base.stacked_factors(path, [None, *adapters])
            modules[path] = _MixedLoRA(linears[path], a, b, self._active)
        base.model.update_modules(tree_unflatten(list(modules.items())))
        factors = [(one.a, one.b) for one in modules.values()]
        mx.eval(factors)
        self.nbytes = sum(x.nbytes for pair in factors for x in pair)

    def cache(self, task: str | None) -> list[Any]:
        """An empty prompt cache for one sequence of a task; None is the base model."""
        slot = 0 if task is None else self._slots[task]
        return [*make_prompt_cache(self.base.model), RowAdapters([slot])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        same = len(set(rows.slots)) == 1
        self._active.slots = rows.slots[0] if same else mx.array(rows.slots)
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # The router runs the inner model directly, as the base.
            self._active.slots = 0
