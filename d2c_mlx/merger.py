"""Merges of a library's adapters as a pack would hold them: method and scale chosen on probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.adapter import Adapter
from d2c_mlx.cluster import Members
from d2c_mlx.config import AUTO_METHODS, RunConfig
from d2c_mlx.inputs import input_activations
from d2c_mlx.merge import merge_adapters, scaled
from d2c_mlx.model import BaseModel
from d2c_mlx.probe import Evaluator, tune_scale
from d2c_mlx.tasks import ExampleSet

__all__ = ["SCALES", "Merged", "Merger"]

# Increasing; the walk of `tune_scale` starts in the middle.
SCALES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
# RegMean looks at this many tokens of a task: all would take some 100 MB per task.
_TOKENS = 128


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
    """Merges any members, each set of members once."""

    def __init__(
        self,
        config: RunConfig,
        base: BaseModel,
        evaluator: Evaluator,
        adapters: Sequence[Adapter],
        probes: Sequence[ExampleSet],
        regret: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        """Merge with the options of `config`.

        Args:
            config: merge_method, density, scale, merge_rank and seed count.
            base: the base model.
            evaluator: of probe losses.
            adapters: one per task.
            probes: one per adapter.
            regret: (losses, tasks) -> normalised regrets, both `(n,)`.
        """
        self._config, self._base, self._evaluator = config, base, evaluator
        self._adapters, self._probes, self._regret = adapters, probes, regret
        self._merges: dict[tuple[str, Members], Merged] = {}
        self._inputs: dict[int, Mapping[str, np.ndarray]] = {}

    def quick(self, members: Members, like: Members = ()) -> Merged:
        """What clusterings compare: "auto" tries one method here, the final merge tries more.

        Args:
            members: what is merged.
            like: members of another merge whose scale is taken; none: the scale is tuned.
        """
        method = self._config.merge_method
        method = "linear" if method == "auto" else method
        if not like or len(members) == 1:
            return self._merged(members, method)
        scale = self._merged(like, method).scale
        return Merged(self._scaled(self._unscaled(members, method), scale), method, scale)

    def final(self, members: Members) -> Merged:
        """What is packed: under "auto" the best of some methods on the members' probes."""
        if self._config.merge_method != "auto" or len(members) == 1:
            return self.quick(members)
        found = [self._merged(members, method) for method in AUTO_METHODS]
        regrets = [one.regret for one in found if one.regret is not None]
        return found[int(np.argmin(regrets))]

    def _merged(self, members: Members, method: str) -> Merged:
        key = method, members
        if key not in self._merges:
            self._merges[key] = self._merge(members, method)
        return self._merges[key]

    def _merge(self, members: Members, method: str) -> Merged:
        merged = self._unscaled(members, method)
        if len(members) == 1:
            return Merged(self._scaled(merged, 1.0), "none", 1.0)
        config = self._config
        tried: dict[float, tuple[Adapter, float]] = {}

        def regret(scale: float) -> float:
            adapter = self._scaled(merged, scale)
            probes = [self._probes[i] for i in members]
            losses = self._evaluator.losses([(adapter, probes)])[0]
            tried[scale] = adapter, float(self._regret(losses, np.array(members)).mean())
            return tried[scale][1]

        if config.scale is not None and config.merge_method != "auto":
            return Merged(self._scaled(merged, config.scale), method, config.scale)
        grid = SCALES if config.scale is None else (config.scale,)
        best = tune_scale(regret, grid)
        return Merged(tried[best][0], method, best, tried[best][1])

    def _unscaled(self, members: Members, method: str) -> Adapter:
        return merge_adapters(
            [self._adapters[i] for i in members],
            method,
            self._config.density,
            self._config.merge_rank,
            seed=self._config.seed,
            activations=self._activations(members) if method == "regmean" else None,
        )

    def _scaled(self, merged: Adapter, scale: float) -> Adapter:
        return (merged if scale == 1 else scaled(merged, scale)).uniform(self._base.dtype)

    def _activations(self, members: Members) -> dict[str, list[np.ndarray]]:
        """Inputs of every module that some member has, under each member on its own probes."""
        paths = sorted({path for i in members for path in self._adapters[i].modules})
        for i in members:
            if i not in self._inputs or not set(paths) <= self._inputs[i].keys():
                found = input_activations(self._base, self._adapters[i], self._probes[i], paths)
                self._inputs[i] = _some_tokens(found)
        return {path: [self._inputs[i][path] for i in members] for path in paths}


def _some_tokens(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Evenly spaced tokens of each array; modules with the same input go on sharing it."""
    arrays = {id(x): x[:: -(-len(x) // _TOKENS)].copy() for x in inputs.values()}
    return {path: arrays[id(x)] for path, x in inputs.items()}
