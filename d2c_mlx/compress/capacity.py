"""Capacity of a budget: bytes for compressed rows, and the number and rank of merged adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from d2c_mlx.adapters.adapter import Adapter, zeros
from d2c_mlx.compress.budget import Budget
from d2c_mlx.compress.storage import CompactStorage, GgufStorage, Storage
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.utils.errors import BudgetError, ConfigError

__all__ = ["Capacity"]


class Capacity:
    """Sizes of a library's adapters and merges as packs store them, and what fits a budget.

    Use `n_clusters` and `merge_rank` for merges in 16 bit, `room` for a compact pack.
    """

    def __init__(
        self,
        base: BaseModel,
        inputs: Sequence[Adapter],
        budget: Budget,
        merge_rank: int | None,
        form: str = "compact",
    ) -> None:
        """Take one library and one budget; each size is computed when it is first asked for.

        Args:
            base: the base model of all adapters.
            inputs: the adapters.
            budget: the pack's budget.
            merge_rank: largest rank of a merge; None is the largest of the adapters.
            form: of a planned pack, "compact" or "gguf".
        """
        self._base, self._inputs, self._form = base, inputs, form
        self.budget, self._merge_rank = budget, merge_rank

    def nbytes(self, adapter: Adapter) -> int:
        """Bytes of an adapter written in mlx-lm's layout, in the base's dtype."""
        return adapter.uniform(self._base.dtype).nbytes(self._base.n_layers)

    @cached_property
    def sizes(self) -> list[int]:
        """`nbytes` of each input adapter."""
        return [self.nbytes(adapter) for adapter in self._inputs]

    @property
    def total(self) -> int:
        """Bytes of all input adapters, of which a budget in percent is a share."""
        return sum(self.sizes)

    @property
    def max_bytes(self) -> int | None:
        """Bytes that the pack may have; None if only the number of adapters counts."""
        return self.budget.allowed_bytes(self.total)

    @cached_property
    def merge_rank(self) -> int:
        """The largest rank of a merged adapter.

        Raises:
            ConfigError: it is above the full rank of every module, so the rest would be zeros.
        """
        largest = max(adapter.rank for adapter in self._inputs)
        rank = self._merge_rank or largest
        most = max(largest, *(min(self._base.module_shapes[path]) for path in self.target_paths))
        if rank > most:
            raise ConfigError(
                f"merge_rank: found {rank:,}, expected at most {most:,}, which no update of these"
                " modules exceeds"
            )
        return rank

    @cached_property
    def n_clusters(self) -> int:
        """Number of adapters in the pack; all where a budget in bytes has room for them."""
        return min(self.budget.n_adapters or len(self._inputs), len(self._inputs))

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest adapter that a pack may hold, merged or not."""
        return max(self.nbytes_of_rank(self.merge_rank), *self.sizes)

    def nbytes_of_rank(self, rank: int) -> int:
        """Bytes of a merged adapter of this rank with every module that some adapter has."""
        shapes = {path: self._base.module_shapes[path] for path in self.target_paths}
        union = replace(self._inputs[0], base=self.longest_base, modules=zeros(shapes, rank))
        return self.nbytes(union)

    @property
    def longest_base(self) -> str | None:
        """The base-model name in the inputs that takes most bytes; a merge has one of the names."""
        return max((one.base for one in self._inputs), key=lambda name: len(json.dumps(name)))

    @cached_property
    def target_paths(self) -> list[str]:
        """Every module that some adapter has."""
        return sorted({path for adapter in self._inputs for path in adapter.modules})

    @cached_property
    def storage(self) -> Storage:
        """The form of a planned pack.

        Raises:
            InputError: a base model or modules that GGUF has no names for.
        """
        shapes = {path: self._base.module_shapes[path] for path in self.target_paths}
        if self._form == "gguf":
            return GgufStorage(shapes, self._base.config)
        names = [adapter.name for adapter in self._inputs]
        return CompactStorage(names, self.longest_base, shapes)

    @cached_property
    def header_nbytes(self) -> int:
        """Bytes that are set aside for the header of a planned pack."""
        return self.storage.header_nbytes

    @property
    def room(self) -> int:
        """Bytes that a planned pack has for rows under this capacity's budget, see `room_of`."""
        return self.room_of(self.budget)

    def room_of(self, budget: Budget) -> int:
        """Bytes that a planned pack has for rows under any budget.

        Raises:
            BudgetError: the budget is not larger than the header.
        """
        header = self.header_nbytes
        nbytes = budget.allowed_bytes(self.total) or 0
        if nbytes <= header:
            raise BudgetError(
                f"budget: {budget.text} is {nbytes:,} bytes, and the header of a pack takes up"
                f" to {header:,}; give more than that"
            )
        return nbytes - header
