"""Merges of a library's adapters, with method and scale chosen on the calibration rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import closest_scale, svd_features
from d2c_mlx.cluster.partition import Members, Problem
from d2c_mlx.evaluate.capture import ModuleInputs, input_activations
from d2c_mlx.merge.layerwise import merge_layerwise
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import MergeOptions, find_method, merge_adapters, scaled
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

# The best scale on calibration rows is about this multiple of the scale closest in dW: 1 to 5 times
# it, measured with eleven methods on 24 real adapters.
_MORE = 2.5
# Without rows a scale is the closest one to this power: 1 for copies, and off by a factor of 1.25
# from the best on calibration rows of 22 merges by tsv, of 2 to 10 real adapters.
_BETWEEN = 0.4
# Most tokens that RegMean reads of a task, and of all tasks. Each takes 140 KB of memory on
# SmolLM2-135M, and four times as many per task gained nothing.
_TOKENS, _ALL_TOKENS = 128, 4096
# Passes of RegMean++: the first gains most, later ones lose as often as they gain. Another one is
# kept only if the regret falls by more than this.
_PASSES, _LEAST_FALL = 3, 1e-3
# Scales of layer-wise merges of few unlike members, and of more than so many. A search took 1.4 for
# 67 of 94 clusters of 24 real adapters, 1.0 for 21; their regrets differ by about 0.005.
_FEW, _SCALE_OF_FEW, _SCALE_OF_MORE = 2.5, 1.0, 1.4
# A search of at most so many adapters measures merges as they ship, in nats.
_JUDGED_AS_SHIPPED = 8
# Most tokens that `layerwise` reads of a task; it keeps those of one block at a time.
_LAYERWISE_TOKENS = 512


@dataclass(frozen=True)
class Merged:
    """One merge.

    Attributes:
        adapter: the merge, with one rank and one scale, in the base model's 16-bit dtype.
        method: one of `RUN_METHODS` or a plug-in; "none" for a single adapter.
        scale: factor on dW; 1 for a single adapter.
        regret: mean normalised regret of the members on their calibration rows; infinity if it was
            not measured.
    """

    adapter: Adapter
    method: str
    scale: float
    regret: float = math.inf


def method_of(library: Library, options: MergeOptions, quick: bool = False) -> str:
    """The method that `merge` takes: the one asked for, else the best that model and rows allow.

    With `quick` it is that of `quick_merge`, for searches. Few adapters are judged by merges that
    ship: these rank partitions of six as held-out rows do (0.89, 0.94), RegMean's do not (0.28).
    """
    method = options.method
    if not method and not library.tasks:
        # The mean is the closest update, which a plan compares with stored forms.
        method = "linear" if library.planned else "tsv"
    elif not method:
        by_block = library.base.runs_in_parts(range(1, library.base.n_layers), prefix=False)
        method = "layerwise" if by_block else "regmean++"
    few = len(library.adapters) <= _JUDGED_AS_SHIPPED and method == "layerwise"
    return "regmean" if quick and not few and method in ("layerwise", "regmean++") else method


def merge(library: Library, members: Members, options: MergeOptions) -> Merged:
    """Merge some adapters of a library for a pack, the best that its rows allow.

    Use `quick_merge` to compare many merges, and `methods.merge_adapters` without a library.

    Args:
        library: has the adapters, and the calibration rows that tune the merge.
        members: indices of the adapters to merge.
        options: method, rank and seed of the merge.
    """
    method, key = method_of(library, options), (members, options)
    if key in library.merges:
        return library.merges[key]
    if method == "layerwise" and len(members) > 1:
        # Copies of one adapter count as one, and adapters that have nothing in common each. Two
        # that are opposed would count as more than two.
        alike = library.similarity[np.ix_(members, members)].sum()
        few = len(members) <= 2 or len(members) ** 2 <= _FEW * alike
        scale = _SCALE_OF_FEW if few else _SCALE_OF_MORE
        rows = [library.tasks[i].calibration_and_extra for i in members]
        # Forward passes under the members and of the merge, in parts.
        cost, scorer = 2 * sum(task.n_tokens for task in rows), library.scorer
        scorer.progress.expect(cost)
        adapters, rank = [library.adapters[i] for i in members], options.rank
        fitted = merge_layerwise(
            library.base, adapters, rows, scorer.engine.workers, scale=scale, rank=rank,
            most=_LAYERWISE_TOKENS, sketches=[library.sketch(i) for i in members],
            advance=lambda share: scorer.progress.advance(cost * share),
        )  # fmt: skip
        adapter = library.spool.put(fitted.uniform(library.base.dtype))
        library.merges[key] = Merged(adapter, method, scale)
        give_back_memory()  # What is in the file is a copy.
        return library.merges[key]
    best = quick_merge(library, members, options)
    if method == "regmean++" and len(members) > 1:
        # The paper (RegMean++, https://arxiv.org/abs/2508.03121) goes block by block. Here all
        # blocks are merged again from the inputs under the last merge: one forward pass per task,
        # which stops when the calibration rows do not gain.
        for _ in range(_PASSES):
            inputs = _inputs_of(library, members, best.adapter)
            last = _tuned(library, members, method, options, inputs)
            if last.regret >= best.regret - _LEAST_FALL:
                break
            best = last
    return best


def quick_merge(
    library: Library, members: Members, options: MergeOptions, scale: float | None = None
) -> Merged:
    """`merge` by the quick `method_of`, for clusterings, which compare many merges.

    `scale` is that of another merge, which is then not tuned; None tunes it.
    """
    if len(members) == 1:
        only = merge_adapters([library.adapters[members[0]]])
        return Merged(only.uniform(library.base.dtype), "none", 1.0)
    method, inputs = method_of(library, options, quick=True), list[ModuleInputs]()
    if method == "layerwise":
        return merge(library, members, options)
    if find_method(method).reads_inputs:
        for i in members:  # Each under its own adapter.
            if (own := library.kept_arrays.get(i)) is None:
                (own,) = _inputs_of(library, (i,), library.adapters[i])
                size = sum({id(x): x.nbytes for x in own.values()}.values())
                library.kept_arrays.put(i, own, size)
            inputs.append(own)
    return _tuned(library, members, method, options, inputs, scale)


def problem_of(library: Library, options: MergeOptions) -> Problem:
    """The problem that clusterings of a library solve; each set of members is merged once."""
    # A search makes hundreds, each as large as an adapter, and asks again for most of them.
    merges: dict[Members, Merged] = {}
    # Nats decide between few adapters. RegMean, the judge of many, sees more by shares of gains:
    # three slots of 24 chosen by shares lost 0.071 nats on held-out rows, chosen by nats 0.090.
    few = len(library.adapters) <= _JUDGED_AS_SHIPPED
    gain = library.losses.gain if library.losses and few else np.ones(len(library.adapters))

    def merge_of(members: Members, like: Members = ()) -> Adapter:
        if like and len(members) > 1:
            merge_of(like)
            return quick_merge(library, members, options, merges[like].scale).adapter
        if members not in merges:
            merged = quick_merge(library, members, options)
            give_back_memory()  # What is written is a copy.
            merges[members] = replace(merged, adapter=library.spool.put(merged.adapter))
            give_back_memory()
        return merges[members].adapter

    return Problem(
        merge=merge_of,
        measure=library.regrets_of,
        features=svd_features(library.similarity),
        fading=library.fading,
        similarity=library.similarity,
        weights=gain / gain.mean(),
    )


def _tuned(
    library: Library,
    members: Members,
    method: str,
    options: MergeOptions,
    inputs: Sequence[ModuleInputs],
    scale: float | None = None,
) -> Merged:
    """A merge at a scale; None takes the best on the calibration rows, without any by weights."""
    own, quick = [library.adapters[i] for i in members], method.removesuffix("++")
    activations = {path: [each[path] for each in inputs] for path in inputs[0]} if inputs else None
    unscaled = merge_adapters(
        own, quick, rank=options.rank, seed=options.seed, activations=activations
    )

    def at(scale: float) -> Adapter:
        adapter = unscaled if scale == 1 else scaled(unscaled, scale)
        return adapter.uniform(library.base.dtype)

    def regret(scale: float) -> float:
        (regrets,) = library.regrets_of([(at(scale), members)])
        return float(regrets.mean())

    lowest = math.inf
    if scale is None and not library.tasks:
        closest = closest_scale(unscaled, own)
        near = closest > 0 and not library.planned
        scale = float(f"{closest**_BETWEEN:.2g}") if near else 1.0
    elif scale is None:
        start = None
        if quick != "regmean":  # Its outputs are closest to the members' already.
            # Below the middle for methods that add the members up.
            closest, middle = closest_scale(unscaled, own), COARSE_SCALES[len(COARSE_SCALES) // 2]
            start = min(_MORE * closest, middle) if closest > 0 else None
        # The best is scaled again: all that is tried would take the memory of as many adapters.
        scale, lowest = line_search(regret, COARSE_SCALES, start)
    return Merged(at(scale), method, scale, lowest)


def _inputs_of(library: Library, tasks: Members, adapter: Adapter) -> list[ModuleInputs]:
    """The inputs of every module that any adapter has, for each task under one adapter."""
    most = min(_TOKENS, _ALL_TOKENS // len(library.adapters) + 1)
    rows, workers = [library.tasks[i].calibration for i in tasks], library.scorer.engine.workers
    paths = sorted({path for adapter in library.adapters for path in adapter.modules})
    return input_activations(library.base, adapter, rows, paths, most, workers)
