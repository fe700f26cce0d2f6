"""One base model, and a batch in which each row has an adapter of its own.

Adapters in memory are stacked per module, one in each slot; each row takes its factors from the
stack (S-LoRA, https://arxiv.org/abs/2311.03285; here by `mx.gather_mm`).

Which adapter a row has is one more entry of its prompt cache, not a table beside the batch:
mlx-lm's batch generator merges, filters and splits caches itself, so a row cannot get another's
adapter, and nothing of mlx-lm's is replaced.

Beginnings that prompts share, a system message and examples say, are processed once (`Prefixes`):
keys and values of the layers are kept by hashes of the adapter's seat and the tokens, so that what
one adapter made is never found for another, nor for new weights under an old name. The tokens
themselves are not kept. mlx-lm's `LRUPromptCache` keeps whole prompts, forgets those first
that came first, however often they are asked for, and cannot drop those of one adapter.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.model import Model

__all__ = [
    "Beginning",
    "Factors",
    "MixedModel",
    "Prefixes",
    "Ranks",
    "RowAdapters",
    "Seat",
    "ranks_of",
]

# Module path -> `a (1, in, r)` and `b (1, r, out)` of an adapter.
Factors = Mapping[str, tuple[mx.array, mx.array]]
# Module path -> rank of an adapter.
Ranks = Mapping[str, int]
# Beginnings end at multiples of so many tokens, as those of vLLM.
_BLOCK = 16
# Hashes of beginnings that are remembered, to find those that come again: some megabytes.
_MOST_SEEN = 1 << 14


@dataclass(eq=False)
class Seat:
    """The place of an adapter in memory, or of the base model.

    Attributes:
        slot: in the stacks now, it changes when others come and go; 0 is the base.
        ranks: of its modules.
        number: unlike that of any other seat, also of the same adapter.
    """

    slot: int = 0
    ranks: Ranks = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)

    def __deepcopy__(self, _memo: object) -> Seat:
        """mlx-lm copies the caches of prompts; their rows keep this very seat."""
        return self


class RowAdapters:
    """The adapter of every row of a batch, as an entry of an mlx-lm prompt cache.

    Attributes:
        rows: for each row, the seat of its adapter.
    """

    nbytes = 0
    state = ()

    def __init__(self, rows: Sequence[Seat]) -> None:
        self.rows = list(rows)

    @classmethod
    def merge(cls, caches: Sequence[RowAdapters]) -> RowAdapters:
        """The entry of the batch that these batches make, one after the other."""
        return cls([row for cache in caches for row in cache.rows])

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


class _MixedLoRA(nn.Module):
    """`linear(x) + (x @ a[slot]) @ b[slot]`, `a (slots, in, r)` and `b (slots, r, out)`."""

    def __init__(
        self, linear: nn.Module, shape: tuple[int, int], n_slots: int, mixed: MixedModel
    ) -> None:
        super().__init__()
        self.linear, self.mixed = linear, mixed
        self.a, self.b = mx.zeros((n_slots, shape[0], 0)), mx.zeros((n_slots, 0, shape[1]))

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.mixed.slots
        if not self.a.shape[2] or (isinstance(slots, int) and not slots):
            return y
        if isinstance(slots, int):
            update = (x @ self.a[slots]) @ self.b[slots]
        else:
            update = mx.gather_mm(x, self.a, rhs_indices=slots)
            update = mx.gather_mm(update, self.b, rhs_indices=slots)
        return y + update.astype(y.dtype)

    def arrange(
        self, kept: Sequence[int], new: Sequence[tuple[mx.array, mx.array] | None], rank: int
    ) -> None:
        """Stack what is in some slots and new factors, all at one rank; None is no update."""
        dtype = next((pair[0].dtype for pair in new if pair), self.a.dtype)
        nothing = self.a[:1, :, :0].astype(dtype), self.b[:1, :0].astype(dtype)
        pairs = [(self.a[slot : slot + 1], self.b[slot : slot + 1]) for slot in kept]
        pairs += [pair or nothing for pair in new]
        cut = [(a[:, :, :rank].astype(dtype), b[:, :rank].astype(dtype)) for a, b in pairs]
        pads = [(0, rank - a.shape[2]) for a, _ in cut]
        none = (0, 0)
        self.a = mx.concatenate([mx.pad(a, [none, none, pad]) for (a, _), pad in zip(cut, pads)])
        self.b = mx.concatenate([mx.pad(b, [none, pad, none]) for (_, b), pad in zip(cut, pads)])
        # Module by module: before the next, what this one had is free.
        mx.eval(self.a, self.b)


class MixedModel:
    """A base model with adapters in slots.

    Call it like an mlx-lm model, with caches made by `cache`. For one adapter at a time use
    `serve.load`, which needs less memory.

    Attributes:
        base: the model that it runs; its linear modules are replaced.
        base_seat: that of rows without an adapter.
        slots: of the batch that runs: one for all rows, or one for each, `(rows,)`.
    """

    def __init__(self, base: Model) -> None:
        """Take a base without adapters, which is not to be used for anything else then."""
        self.base, self.base_seat = base, Seat()
        self.slots: int | mx.array = 0
        self._modules: dict[str, _MixedLoRA] = {}
        self._linears = dict(base.model.named_modules())

    def factors(self, adapter: Adapter) -> Factors:
        """Make the factors of an adapter."""
        factors = {path: self.base.stacked_factors(path, [adapter]) for path in adapter.modules}
        mx.eval(list(factors.values()))
        return factors

    def arrange(self, kept: Sequence[Seat], new: Sequence[Factors] = ()) -> list[Seat]:
        """Keep some adapters and put new ones beside them; all others leave memory.

        Returns:
            A seat for each of the new ones.
        """
        n_slots = 1 + max((seat.slot for seat in kept), default=0)
        for path in sorted({path for factors in new for path in factors} - self._modules.keys()):
            shape = self.base.module_shapes[path]
            self._modules[path] = _MixedLoRA(self._linears[path], shape, n_slots, self)
            self.base.model.update_modules(tree_unflatten([(path, self._modules[path])]))
        seats = [Seat(ranks=ranks_of(factors)) for factors in new]
        widest = _highest([seat.ranks for seat in (*kept, *seats)])
        for path, module in self._modules.items():
            slots = [0, *(seat.slot for seat in kept)]
            module.arrange(slots, [factors.get(path) for factors in new], widest.get(path, 0))
        for slot, seat in enumerate((*kept, *seats), 1):
            seat.slot = slot
        return seats

    def nbytes_of(self, adapters: Sequence[Ranks]) -> int:
        """Bytes that adapters of these ranks take together: each has the highest of all ranks."""
        shapes = self.base.module_shapes
        width = sum(rank * sum(shapes[path]) for path, rank in _highest(adapters).items())
        # The base has a slot, too.
        return (1 + len(adapters)) * width * self.base.compute_dtype.size

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.nbytes for module in self._modules.values() for x in (module.a, module.b))

    def cache(self, seat: Seat, layers: Sequence[Any] = ()) -> list[Any]:
        """A prompt cache for one sequence, which has what `layers` has; else it is empty."""
        return [*(layers or make_prompt_cache(self.base.model)), RowAdapters([seat])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        slots = [seat.slot for seat in rows.rows]
        self.slots = slots[0] if len(set(slots)) == 1 else mx.array(slots)
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # The router runs the inner model directly, as the base.
            self.slots = 0


def ranks_of(factors: Factors) -> dict[str, int]:
    """Rank of each module of an adapter."""
    return {path: a.shape[2] for path, (a, _) in factors.items()}


def _highest(adapters: Iterable[Ranks]) -> dict[str, int]:
    """The highest rank of each module."""
    highest: dict[str, int] = {}
    for ranks in adapters:
        for path, rank in ranks.items():
            highest[path] = max(highest.get(path, 0), rank)
    return highest


@dataclass(frozen=True)
class Beginning:
    """The beginning of one prompt.

    Attributes:
        n_kept: tokens whose keys and values are there.
        layers: those, one mlx-lm cache for each layer; nothing may change them.
        n_shared: tokens that came before, with whose end the next ones are to be kept; 0 is none.
        name: hash of these.
    """

    n_kept: int = 0
    layers: Sequence[Any] = ()
    n_shared: int = 0
    name: bytes = b""


class Prefixes:
    """Keys and values of beginnings that came twice; those used longest ago give way.

    Attributes:
        nbytes: of all.
    """

    def __init__(self, memory: int) -> None:
        """Keep at most so many bytes; 0 keeps nothing."""
        self._memory, self.nbytes = memory, 0
        # Hash -> seat, layers, and their bytes.
        self._kept: OrderedDict[bytes, tuple[Seat, Sequence[Any], int]] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def find(self, seat: Seat, prompt: Sequence[int]) -> Beginning:
        """The longest beginning that is there, and a longer one if it came before.

        Args:
            seat: of the adapter.
            prompt: token ids; the last is never part of a beginning.
        """
        if not self._memory:
            return Beginning()
        # A hash for each beginning of whole blocks, which is that of the one before and a block.
        name, names = str(seat.number).encode(), list[bytes]()
        for end in range(_BLOCK, len(prompt), _BLOCK):
            block = array("q", prompt[end - _BLOCK : end]).tobytes()
            name = hashlib.sha256(name + block).digest()
            names.append(name)
        n_kept, n_seen = (
            next((n for n in range(len(names), 0, -1) if names[n - 1] in store), 0)
            for store in (self._kept, self._seen)
        )
        for name in names:
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        layers: Sequence[Any] = ()
        if n_kept:
            self._kept.move_to_end(names[n_kept - 1])
            layers = self._kept[names[n_kept - 1]][1]
        if n_seen <= n_kept:
            return Beginning(n_kept * _BLOCK, layers)
        return Beginning(n_kept * _BLOCK, layers, n_seen * _BLOCK, names[n_seen - 1])

    def keep(self, beginning: Beginning, cache: Sequence[Any]) -> None:
        """Keep the shared tokens of a beginning, if they are new and fit.

        Args:
            beginning: from `find`.
            cache: the row's, as `MixedModel.cache` made it, after these tokens.
        """
        *layers, adapter = cache
        nbytes = sum(layer.nbytes for layer in layers)
        if beginning.name in self._kept or nbytes > self._memory:
            return
        mx.eval([layer.state for layer in layers])
        self._kept[beginning.name] = adapter.rows[0], layers, nbytes
        self.nbytes += nbytes
        while self.nbytes > self._memory:
            self.nbytes -= self._kept.popitem(last=False)[1][2]

    def drop(self, seat: Seat) -> None:
        """Forget what an adapter made that has left its seat."""
        for name, (other, _, nbytes) in list(self._kept.items()):
            if other is seat:
                self.nbytes -= nbytes
                del self._kept[name]
