"""Merges as a pack would hold them, with method and scale chosen on the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import closest_scale
from d2c_mlx.adapters.tensor_file import Spool
from d2c_mlx.cluster.partition import Members
from d2c_mlx.evaluate.capture import ModuleInputs, input_activations
from d2c_mlx.evaluate.workers import ByteCache
from d2c_mlx.merge.layerwise import LayerwiseOptions, merge_layerwise
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import find_method, merge_adapters, scaled
from d2c_mlx.merge.options import MergeOptions
from d2c_mlx.models.forward import blocks_are_exact
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

__all__ = ["Merged", "Merger", "Regret"]

# (losses, tasks) -> normalised regrets, both `(n,)`.
Regret = Callable[[np.ndarray, np.ndarray], np.ndarray]

# The best scale on calibration rows is about this multiple of the scale closest in dW: 1 to 5 times
# it, measured with eleven methods on 24 real adapters.
_MORE = 2.5
# Without rows a scale is the closest one to this power: 1 for copies, and off by a factor of 1.25
# from the best on calibration rows of 22 merges by tsv, of 2 to 10 real adapters.
_BETWEEN = 0.4
# Most tokens that RegMean reads of a task, and of all tasks. Each takes 140 KB of memory on
# SmolLM2-135M, and four times as many per task gained nothing.
_TOKENS, _ALL_TOKENS = 128, 4096
# Passes of RegMean++: the first gains most, later ones lose as often as they gain. One is kept only
# if the regret falls by more than this.
_PASSES, _EPS = 3, 1e-3
# Scales of layer-wise merges of few unlike members, and of more than so many. A search took 1.4 for
# 67 of 94 clusters of 24 real adapters, 1.0 for 21; their regrets differ by about 0.005.
_FEW, _SCALE_OF_FEW, _SCALE_OF_MORE = 2.5, 1.0, 1.4
# Most tokens that `layerwise` reads of a task; it keeps those of one block at a time.
_LAYERWISE_TOKENS = 512
# Method -> the cheaper one that clusterings compare instead, because it judges alike.
_QUICK = {"regmean++": "regmean", "layerwise": "regmean"}


@dataclass(frozen=True)
class Merged:
    """One merge.

    Attributes:
        adapter: the merge, with one rank and one scale, in the base model's 16-bit dtype. One that
            a `Merger` keeps is in a temporary file.
        method: one of `RUN_METHODS`, or a plug-in; "none" for a single adapter.
        scale: factor on dW; 1 for a single adapter.
        regret: mean normalised regret of the members on their calibration rows; None if nothing
            was tuned.
    """

    adapter: Adapter
    method: str
    scale: float
    regret: float | None = None


class Merger:
    """Merges any members of a library, each set of members once.

    `quick` serves clusterings, which compare many merges. `final` serves packs. To merge adapters
    without calibration rows, use `methods.merge_adapters`.

    Attributes:
        method: the method that `final` merges by: the one asked for, else the best that the base
            model allows.
        quick_method: the method by which clusterings are compared.
    """

    def __init__(self, library: Library, options: MergeOptions, regret: Regret) -> None:
        """Make a merger.

        Args:
            library: adapters, and the calibration rows that tune their merges; without any a scale
                is between the one closest in dW and 1.
            options: method, rank and seed of the merges.
            regret: converts losses in nats and indices of tasks, both `(n,)`, to normalised
                regrets `(n,)`.
        """
        self._options, self._regret = options, regret
        self._base, self._evaluator = library.base, library.evaluator
        self._adapters, self._probes = library.adapters, library.probes
        self._workers, self._library = library.workers, library
        self.method = options.method or self._best
        self.quick_method = _QUICK.get(self.method, self.method)
        # A search makes hundreds, each as large as an adapter, and asks again for most of them.
        self._merges: dict[tuple[str, Members], Merged] = {}
        self._spool = Spool()
        self._inputs: ByteCache[int, ModuleInputs] = ByteCache(library.engine.free // 8)

    @cached_property
    def _best(self) -> str:
        """The default method, the best that the base model and the rows allow."""
        if not self._probes:
            return "tsv"
        return "layerwise" if blocks_are_exact(self._base.model) else "regmean++"

    def quick(self, members: Members, like: Members = ()) -> Merged:
        """Merge by `quick_method`, for clusterings.

        Args:
            members: indices of the adapters to merge.
            like: members of another merge whose scale is used; empty to tune the scale.
        """
        method = self.quick_method
        if not like or len(members) == 1:
            return self._merged(members, method)
        scale = self._merged(like, method).scale
        return Merged(self._scaled(self._unscaled(members, method), scale), method, scale)

    def final(self, members: Members) -> Merged:
        """Merge for a pack.

        Args:
            members: indices of the adapters to merge.
        """
        return self._merged(members, self.method)

    def _merged(self, members: Members, method: str) -> Merged:
        key = method, members
        if key not in self._merges:
            if len(members) == 1:
                only = merge_adapters([self._adapters[i] for i in members])
                self._merges[key] = Merged(self._scaled(only, 1.0), "none", 1.0)
            elif method == "regmean++":
                self._merges[key] = self._regmean_again(members)
            elif method == "layerwise":
                self._merges[key] = self._layerwise(members)
            else:
                self._merges[key] = self._tuned(self._unscaled(members, method), members, method)
            made = self._merges[key]
            give_back_memory()  # What is written is a copy.
            waiting = self._spool.put(made.adapter)
            self._merges[key] = made if waiting is made.adapter else replace(made, adapter=waiting)
            give_back_memory()
        return self._merges[key]

    def _tuned(self, merged: Adapter, members: Members, method: str) -> Merged:
        tried: dict[float, Adapter] = {}

        def regret(scale: float) -> float:
            tried[scale] = self._scaled(merged, scale)
            (found,) = self._regrets([tried[scale]], members)
            return found

        if self._options.scale is not None:
            return Merged(self._scaled(merged, self._options.scale), method, self._options.scale)
        if not self._probes:
            closest = closest_scale(merged, [self._adapters[i] for i in members])
            scale = float(f"{closest**_BETWEEN:.2g}") if closest > 0 else 1.0
            return Merged(self._scaled(merged, scale), method, scale)
        best, lowest = line_search(regret, COARSE_SCALES, self._start(merged, members, method))
        return Merged(tried[best], method, best, lowest)

    def _start(self, merged: Adapter, members: Members, method: str) -> float | None:
        """The first scale to try; below the middle for methods that add the members up."""
        if method in ("regmean", "regmean++"):
            return None  # The outputs are closest to the members' already.
        closest = closest_scale(merged, [self._adapters[i] for i in members])
        middle = COARSE_SCALES[len(COARSE_SCALES) // 2]
        return min(_MORE * closest, middle) if closest > 0 else None

    def _regmean_again(self, members: Members) -> Merged:
        """RegMean++: merge by RegMean on the inputs under the last merge, and keep the best pass.

        The paper goes block by block. Here all blocks are merged again from the inputs under the
        last merge. That takes one forward pass per task instead of one per block, and it can stop
        when the calibration rows do not gain.

        Source: RegMean++, https://arxiv.org/abs/2508.03121.
        """
        best = self._merged(members, "regmean")
        for _ in range(_PASSES):
            inputs = self._inputs_of(members, best.adapter, members)
            last = self._tuned(self._unscaled(members, "regmean", inputs), members, "regmean++")
            if _regret(last) >= _regret(best) - _EPS:
                break
            best = last
        return best

    def _layerwise(self, members: Members) -> Merged:
        """Merge block by block, at a scale that needs no search, see above."""
        # Copies of one adapter count as one, and adapters that have nothing in common each. Two
        # that are opposed would count as more than two.
        alike = self._library.similarity[np.ix_(members, members)]
        few = len(members) <= 2 or len(members) ** 2 <= _FEW * alike.sum()
        scale = _SCALE_OF_FEW if few else _SCALE_OF_MORE
        rows = [self._library.rows[i] for i in members]
        # Forward passes under the members and of the merge, in parts.
        cost = 2 * sum(some.n_tokens for some in rows)
        self._evaluator.meter.expect(cost)
        made = merge_layerwise(
            self._base, [self._adapters[i] for i in members], rows,
            LayerwiseOptions(scale, rank=self._options.rank, most=_LAYERWISE_TOKENS), self._workers,
        )  # fmt: skip
        self._evaluator.meter.advance(cost)
        return Merged(made.uniform(self._base.dtype), "layerwise", scale)

    def _regrets(self, merges: Sequence[Adapter], members: Members) -> list[float]:
        """The mean normalised regret of the members on their calibration rows, for each merge."""
        probes = [self._probes[i] for i in members]
        losses = self._evaluator.losses([(one, probes) for one in merges])
        return [float(self._regret(some, np.array(members)).mean()) for some in losses]

    def _unscaled(
        self, members: Members, method: str, inputs: Sequence[ModuleInputs] | None = None
    ) -> Adapter:
        """The merge before its scale; RegMean uses `inputs`, or each member's own inputs."""
        activations = None
        if find_method(method).reads_inputs:
            found = inputs or [self._own_inputs(i, members) for i in members]
            activations = {path: [one[path] for one in found] for path in self._paths(members)}
        return merge_adapters(
            [self._adapters[i] for i in members],
            method,
            rank=self._options.rank,
            seed=self._options.seed,
            activations=activations,
        )

    def _scaled(self, merged: Adapter, scale: float) -> Adapter:
        return (merged if scale == 1 else scaled(merged, scale)).uniform(self._base.dtype)

    def _paths(self, members: Members) -> list[str]:
        """Paths of the modules that any member has."""
        return sorted({path for i in members for path in self._adapters[i].modules})

    def _own_inputs(self, i: int, members: Members) -> ModuleInputs:
        """The module inputs of task i under its own adapter."""
        found = self._inputs.get(i)
        if found is None or not set(self._paths(members)) <= found.keys():
            (found,) = self._inputs_of((i,), self._adapters[i], members)
            distinct = {id(x): x.nbytes for x in found.values()}
            self._inputs.put(i, found, sum(distinct.values()))
        return found

    def _inputs_of(self, tasks: Members, adapter: Adapter, members: Members) -> list[ModuleInputs]:
        """The inputs of every module that any member has, for each task under one adapter."""
        return input_activations(
            self._base, adapter, [self._probes[i] for i in tasks], self._paths(members),
            min(_TOKENS, _ALL_TOKENS // len(self._adapters) + 1), self._workers,
        )  # fmt: skip


def _regret(merged: Merged) -> float:
    return math.inf if merged.regret is None else merged.regret
