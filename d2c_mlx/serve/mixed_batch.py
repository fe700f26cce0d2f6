"""One base model, a batch whose rows have adapters of their own.

All adapters of a pack are in memory at once, stacked per module, and a row picks its factors from
the stack (S-LoRA, https://arxiv.org/abs/2311.03285; here `mx.gather_mm`). Which adapter a row has
travels with its keys and values, as one more entry of mlx-lm's prompt cache: wherever mlx-lm's
batch generator merges, drops or reorders sequences, their adapters go along.
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
    """Which adapter every row of a batch has: an entry of an mlx-lm prompt cache.

    Attributes:
        slots: a position in the stack for each row; 0 is the base model.
    """

    nbytes = 0
    state = ()

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = list(slots)

    @classmethod
    def merge(cls, caches: Sequence[RowAdapters]) -> RowAdapters:
        """Of the batch that these make, one after the other."""
        return cls([slot for one in caches for slot in one.slots])

    def extend(self, other: RowAdapters) -> None:
        """Add the rows of another batch."""
        self.slots += other.slots

    def filter(self, keep: Sequence[int]) -> None:
        """Keep some rows, in this order."""
        self.slots = [self.slots[i] for i in keep]

    def extract(self, row: int) -> RowAdapters:
        """Of one row alone."""
        return RowAdapters([self.slots[row]])

    def prepare(self, **_padding: object) -> None:
        """Padding changes no adapter."""

    def finalize(self) -> None:
        """Nor does its end."""


class _Rows:
    """The slots of the batch that runs: one for all rows, or one each, `(rows,)`."""

    slots: int | mx.array = 0


class _MixedLoRA(nn.Module):
    """`linear(x) + (x @ a[slot]) @ b[slot]` with `a (slots, in, r)` and `b (slots, r, out)`."""

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array, rows: _Rows) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.rows = linear, a, b, rows

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.rows.slots
        if isinstance(slots, int):
            if not slots:
                return y
            update = (x @ self.a[slots]) @ self.b[slots]
        else:
            update = mx.gather_mm(x, self.a, rhs_indices=slots)
            update = mx.gather_mm(update, self.b, rhs_indices=slots)
        return y + update.astype(y.dtype)


class MixedModel:
    """A pack on its base model; call it as an mlx-lm model, with caches of `cache`.

    Attributes:
        base: the model that it runs; its linear modules are replaced.
        nbytes: of all adapters in memory.
    """

    def __init__(self, base: BaseModel, pack: Pack) -> None:
        """Load all adapters.

        Args:
            base: the pack's, without adapters; it can serve nothing else afterwards.
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
        self._rows = _Rows()
        linears = dict(base.model.named_modules())
        modules = {}
        for path in sorted({path for one in adapters if one for path in one.modules}):
            a, b = base.stacked(path, [None, *adapters])
            modules[path] = _MixedLoRA(linears[path], a, b, self._rows)
        base.model.update_modules(tree_unflatten(list(modules.items())))
        factors = [(one.a, one.b) for one in modules.values()]
        mx.eval(factors)
        self.nbytes = sum(x.nbytes for pair in factors for x in pair)

    def cache(self, task: str | None) -> list[Any]:
        """An empty prompt cache of one sequence for a task of the pack; None is the base model."""
        slot = 0 if task is None else self._slots[task]
        return [*make_prompt_cache(self.base.model), RowAdapters([slot])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        alike = len(set(rows.slots)) == 1
        self._rows.slots = rows.slots[0] if alike else mx.array(rows.slots)
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # Who runs the inner model by itself (routing) gets the base.
            self._rows.slots = 0
