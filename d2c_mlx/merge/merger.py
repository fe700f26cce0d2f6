"""Merges of a library's adapters as a pack would hold them: method and scale chosen on probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import closest_scale
from d2c_mlx.cluster.partition import Members
from d2c_mlx.evaluate.capture import ModuleInputs, input_activations
from d2c_mlx.merge.layerwise import STRENGTH, merge_layerwise
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.merge.options import AUTO_METHODS, MergeOptions
from d2c_mlx.models.forward import blocks_are_exact
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

__all__ = ["Merged", "Merger", "Regret"]

# (losses, tasks) -> normalised regrets, both `(n,)`.
Regret = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Probes ask for about so many times the scale that is closest in dW: 1 to 5, by eleven methods
# on 24 real adapters.
_MORE = 2.5
# RegMean looks at so many tokens of a task, and of all tasks: each takes 140 KB of memory on
# SmolLM2-135M, and four times as many per task gained nothing.
_TOKENS, _ALL_TOKENS = 128, 4096
# Of RegMean++; the first gains most, later ones as often lose.
_PASSES = 3
# `layerwise` looks at so many tokens of a task; it keeps those of one block at a time.
_LAYERWISE_TOKENS = 512
# Clusterings compare what is cheaper and judges alike; each of these begins with its scale.
_QUICK = {"regmean++": "regmean", "layerwise": "regmean", "auto": "regmean"}


@dataclass(frozen=True)
class Merged:
    """One merge.

    Attributes:
        adapter: one rank, one scale, the base's 16-bit dtype.
        method: a key of `merge.METHODS`; "none" for a single adapter.
        scale: of dW; 1 for a single adapter.
        regret: mean normalised regret of the members on their probes; None if nothing was tuned.
    """

    adapter: Adapter
    method: str
    scale: float
    regret: float | None = None


class Merger:
    """Merges any members, each set of members once.

    Attributes:
        quick_method: by which clusterings are compared.
    """

    def __init__(self, library: Library, options: MergeOptions, regret: Regret) -> None:
        """Merge adapters of a library.

        Args:
            library: adapters, and the rows that tune their merges.
            options: how to merge.
            regret: (losses, tasks) -> normalised regrets, both `(n,)`.
        """
        self._options, self._regret = options, regret
        self._base, self._evaluator = library.base, library.evaluator
        self._adapters, self._probes = library.adapters, library.probes
        self._workers = library.workers
        self._method = options.method or self._best
        self.quick_method = _QUICK.get(self._method, self._method)
        self._merges: dict[tuple[str, Members], Merged] = {}
        self._inputs: dict[int, ModuleInputs] = {}

    @cached_property
    def _best(self) -> str:
        """The default."""
        return "layerwise" if blocks_are_exact(self._base.model) else "regmean++"

    def quick(self, members: Members, like: Members = ()) -> Merged:
        """What clusterings compare; `final` may try more.

        Args:
            members: what is merged.
            like: members of another merge whose scale is taken; none: the scale is tuned.
        """
        method = self.quick_method
        if not like or len(members) == 1:
            return self._merged(members, method)
        scale = self._merged(like, method).scale
        return Merged(self._scaled(self._unscaled(members, method), scale), method, scale)

    def final(self, members: Members) -> Merged:
        """What is packed: under "auto" the best of some methods on the members' probes."""
        if len(members) == 1 or self._method != "auto":
            return self._merged(members, self._method)
        found = [self._merged(members, method) for method in (*AUTO_METHODS, self._best)]
        return min(found, key=_regret)

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
        return self._merges[key]

    def _tuned(self, merged: Adapter, members: Members, method: str) -> Merged:
        options = self._options
        tried: dict[float, Adapter] = {}

        def regret(scale: float) -> float:
            tried[scale] = self._scaled(merged, scale)
            (found,) = self._regrets([tried[scale]], members)
            return found

        if options.scale is not None and self._method not in _QUICK:
            return Merged(self._scaled(merged, options.scale), method, options.scale)
        scales = COARSE_SCALES if options.scale is None else (options.scale,)
        best, lowest = line_search(regret, scales, self._start(merged, members, method))
        return Merged(tried[best], method, best, lowest)

    def _start(self, merged: Adapter, members: Members, method: str) -> float | None:
        """Where scales begin: below the middle for what is a sum of the members."""
        if method in ("regmean", "regmean++"):
            return None  # is closest to the members already, in outputs
        closest = closest_scale(merged, [self._adapters[i] for i in members])
        middle = COARSE_SCALES[len(COARSE_SCALES) // 2]
        return min(_MORE * closest, middle) if closest > 0 else None

    def _regmean_again(self, members: Members) -> Merged:
        """RegMean on the inputs that modules have under the last merge: the best of some passes.

        Source: RegMean++, https://arxiv.org/abs/2508.03121, which goes block by block; here all
        blocks are merged anew until the probes do not gain.
        """
        best = self._merged(members, "regmean")
        for _ in range(_PASSES):
            inputs = self._inputs_of(members, best.adapter, members)
            last = self._tuned(self._unscaled(members, "regmean", inputs), members, "regmean++")
            if _regret(last) >= _regret(best) - self._options.eps:
                break
            best = last
        return best

    def _layerwise(self, members: Members) -> Merged:
        """With and without making up for what is lacking, the better higher while the probes gain.

        Scales begin with that of RegMean. Without it is RegMean++ as in its paper, block by block,
        and called so.
        """
        plain = self._merged(members, "regmean")
        without, making_up = self._aimed(members, [(plain.scale, 0.0), (plain.scale, STRENGTH)])
        better = min(without, making_up, key=_regret)
        strength = STRENGTH if better is making_up else 0.0
        found = [plain, better]

        def regret(scale: float) -> float:
            if scale != plain.scale:
                found.extend(self._aimed(members, [(scale, strength)]))
            return _regret(found[-1])

        scales = [one for one in COARSE_SCALES if one >= plain.scale]
        if self._options.scale is not None:
            scales = [plain.scale]
        line_search(regret, scales, scales[0])
        return min(found, key=_regret)

    def _aimed(self, members: Members, aims: Sequence[tuple[float, float]]) -> list[Merged]:
        """Layer-wise merges of scales and strengths."""
        # Forwards under the members, and of each merge in parts.
        cost = (1 + 2 * len(aims)) * sum(self._probes[i].n_tokens for i in members)
        self._evaluator.meter.expect(cost)
        made = merge_layerwise(
            self._base, [self._adapters[i] for i in members], [self._probes[i] for i in members],
            aims, self._options.rank, _LAYERWISE_TOKENS, self._workers,
        )  # fmt: skip
        self._evaluator.meter.advance(cost)
        found = [one.uniform(self._base.dtype) for one in made]
        return [
            Merged(one, "layerwise" if strength else "regmean++", scale, regret)
            for one, (scale, strength), regret in zip(found, aims, self._regrets(found, members))
        ]

    def _regrets(self, merges: Sequence[Adapter], members: Members) -> list[float]:
        """Of each the mean normalised regret of the members on their probes."""
        probes = [self._probes[i] for i in members]
        losses = self._evaluator.losses([(one, probes) for one in merges])
        return [float(self._regret(some, np.array(members)).mean()) for some in losses]

    def _unscaled(
        self, members: Members, method: str, inputs: Sequence[ModuleInputs] | None = None
    ) -> Adapter:
        """Before its scale; RegMean takes `inputs`, or those that every member has of its own."""
        activations = None
        if method == "regmean":
            found = inputs or [self._own_inputs(i, members) for i in members]
            activations = {path: [one[path] for one in found] for path in self._paths(members)}
        return merge_adapters(
            [self._adapters[i] for i in members],
            method,
            self._options.density,
            self._options.rank,
            seed=self._options.seed,
            activations=activations,
        )

    def _scaled(self, merged: Adapter, scale: float) -> Adapter:
        return (merged if scale == 1 else scaled(merged, scale)).uniform(self._base.dtype)

    def _paths(self, members: Members) -> list[str]:
        """Modules that some member has."""
        return sorted({path for i in members for path in self._adapters[i].modules})

    def _own_inputs(self, i: int, members: Members) -> ModuleInputs:
        """Of task i under its own adapter."""
        if i not in self._inputs or not set(self._paths(members)) <= self._inputs[i].keys():
            (self._inputs[i],) = self._inputs_of((i,), self._adapters[i], members)
        return self._inputs[i]

    def _inputs_of(self, tasks: Members, adapter: Adapter, members: Members) -> list[ModuleInputs]:
        """What tokens of tasks are at every module that a member has, under an adapter."""
        return input_activations(
            self._base, adapter, [self._probes[i] for i in tasks], self._paths(members),
            min(_TOKENS, _ALL_TOKENS // len(self._adapters) + 1), self._workers,
        )  # fmt: skip


def _regret(merged: Merged) -> float:
    return math.inf if merged.regret is None else merged.regret
