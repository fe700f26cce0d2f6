"""Merging adapters on dW, with any ranks and target modules.

A method is a function of one module's factors and of `Options`, wrapped in a `MergeMethod` that
says what a merge must know of it. Each function names its paper, docs/reference/merge-methods.md
says when to use which. Those in core space are in combine.py, RegMean is in regmean.py, and other
packages add theirs by entry points (plugins.py).
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import CoreSpace, Factors, factorise, to_core
from d2c_mlx.merge.combine import ties, tsv
from d2c_mlx.merge.regmean import Grams, regmean
from d2c_mlx.plugins import MERGE_METHODS, Plugin, find, readonly
from d2c_mlx.utils.errors import AdapterError, ConfigError

__all__ = [
    "METHODS",
    "NEED_ROWS",
    "READ_ANSWERS",
    "RUN_METHODS",
    "MergeMethod",
    "MergeOptions",
    "Options",
    "find_method",
    "in_core",
    "merge_adapters",
    "scaled",
    "truncated",
]

# Module path -> the inputs of that module, `(n_tokens, in)`, one array per adapter.
_Activations = Mapping[str, Sequence[np.ndarray]]

# Those that look at calibration rows.
NEED_ROWS = ("regmean", "regmean++", "layerwise")
# Those that also read adapters' answers to prompts beside the rows; None is the default.
READ_ANSWERS = (None, "layerwise")
# Number of groups of modules in memory at a time.
_GROUPS = 16


@dataclass(frozen=True)
class MergeOptions:
    """Options for merging the adapters of a cluster into one.

    Attributes:
        method: one of `RUN_METHODS` or a plug-in; None takes the best that the model allows.
        rank: largest rank of a merge; None takes the largest of the adapters.
        seed: seed of all random choices.
    """

    method: str | None = None
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Options:
    """The input of a method beside the factors of one module.

    Attributes:
        rank: most columns of the result, unless the method sums ranks.
        density: share of entries kept by methods that sparsify.
        seed: the module's own seed, below 2^32.
        weights: `(T,)` weights of the adapters.
        scales: the T scales that were folded into each b.
        grams: the module's Gram matrices of T tasks; None unless the method reads inputs.
    """

    rank: int
    density: float
    seed: int
    weights: np.ndarray
    scales: tuple[float, ...] = ()
    grams: Grams | None = None


@dataclass(frozen=True)
class MergeMethod:
    """A merge method, and what has to be known of it before it is called.

    Attributes:
        merge: function of T pairs `a (in, r_i)`, `b (r_i, out)` of one module, scales folded into
            b, and `Options`; it returns `a (in, k)`, `b (k, out)`.
        weighted: it takes weights of the adapters.
        sums_ranks: the rank of its result is the sum of all ranks, whatever rank is asked for.
        reads_inputs: it needs the inputs of modules, `Options.grams`, and so calibration rows.
    """

    merge: Callable[[Sequence[Factors], Options], Factors]
    weighted: bool = False
    sums_ranks: bool = False
    reads_inputs: bool = False

    def __call__(self, factors: Sequence[Factors], options: Options) -> Factors:
        """Merge one module."""
        return self.merge(factors, options)


def in_core(
    merge: Callable[[CoreSpace, Options], np.ndarray], weighted: bool = False
) -> MergeMethod:
    """Make a method of a function that gives the merged core `(q, p)`, see core_space.py."""

    def method(factors: Sequence[Factors], options: Options) -> Factors:
        space = to_core(factors)
        return factorise(merge(space, options), space.q_a, space.q_b, options.rank)

    return MergeMethod(method, weighted)


def truncated(factors: Sequence[Factors], rank: int) -> Factors:
    """The sum of the factor pairs, in at most `rank` columns."""
    space = to_core(factors)
    core = space.weighted_sum(np.ones(len(factors)))
    return factorise(core, space.q_a, space.q_b, rank)


def _regmean(factors: Sequence[Factors], options: Options) -> Factors:
    assert options.grams, "checked by merge_adapters"
    return truncated([regmean(factors, options.grams, options.rank)], options.rank)


METHODS = {
    # The mean, the reference for all others: task arithmetic, https://arxiv.org/abs/2212.04089.
    "linear": in_core(lambda space, o: space.weighted_sum(o.weights), weighted=True),
    "ties": in_core(lambda space, o: ties(space.updates, o.density)),
    "tsv": in_core(lambda space, o: tsv(space, o.rank)),
    "regmean": MergeMethod(_regmean, reads_inputs=True),
}
# And two that ask the model, which `merging.merge` makes.
RUN_METHODS = (*METHODS, "regmean++", "layerwise")


def find_method(name: str) -> MergeMethod:
    """The method of a name: a key of `METHODS`, or a plug-in's, whose results are checked.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    plugin = find(MERGE_METHODS, name, tuple(METHODS))
    loaded = plugin.load()
    method = loaded if isinstance(loaded, MergeMethod) else MergeMethod(loaded)
    return replace(method, merge=partial(_merge_by, plugin, method.sums_ranks))


def _merge_by(
    plugin: Plugin, sums_ranks: bool, factors: Sequence[Factors], options: Options
) -> Factors:
    """Merge one module by a plug-in, which cannot change the factors.

    Raises:
        D2CError: it failed, or returned anything but a pair of finite factors within the rank.
    """
    width, out = len(factors[0][0]), factors[0][1].shape[1]
    most = sum(len(b) for _, b in factors) if sums_ranks else options.rank
    result = plugin.call([(readonly(a), readonly(b)) for a, b in factors], options)
    match result:
        case (np.ndarray() as a, np.ndarray() as b) if a.dtype.kind == b.dtype.kind == "f":
            good = any((a.shape, b.shape) == ((width, k), (k, out)) for k in range(1, most + 1))
        case _:
            good = False
    if not good:
        expected = f"two float arrays of ({width}, k) and (k, {out}), k from 1 to {most}"
        raise plugin.wrong(result, expected)
    with np.errstate(over="ignore"):  # an overflow is infinite, which is told below
        a, b = a.astype(np.float32), b.astype(np.float32)
    if bad := int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum()):
        raise plugin.wrong(f"{bad} values that are not finite in float32", "none")
    return a, b


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str = "linear",
    density: float = 0.5,
    rank: int | None = None,
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    activations: _Activations | None = None,
) -> Adapter:
    """Merge adapters into one.

    Use it to merge without a model; `merging.merge` also tunes the scale on calibration rows. A
    module that an adapter lacks counts as a zero update. The order of `adapters` does not matter.
    One adapter without `weights` is returned as it is.

    Args:
        adapters: at least one, all of the same base model.
        method: a key of `METHODS`, or the name of a plug-in.
        density: share of entries kept by methods that sparsify, above 0 and at most 1.
        rank: most columns of every module of the result; None takes the largest rank of
            `adapters`.
        seed: seed of the methods that draw; every module draws its own numbers.
        weights: one per adapter, for `linear` and other weighted methods; None is 1 / n each.
        activations: inputs of every module, for `regmean` and others that read them, one array per
            adapter in the order of `adapters`, also for adapters without the module; see
            `evaluate.capture.input_activations`.

    Returns:
        An adapter of float32 factors with scale 1, named after the sorted members.

    Raises:
        ConfigError: the method is unknown, an option is out of range, or the method needs an option
            that is missing or takes none of that name.
        AdapterError: a module has different shapes, so the adapters are of different base models.
        D2CError: a plug-in failed, or returned what is no merge.
    """
    how = find_method(method)
    _check(adapters, method, how, density, rank, weights, activations)
    # By name, then by content; only equal names cost a digest of all bytes.
    counts = Counter(adapter.name for adapter in adapters)
    keys = [(each.name, counts[each.name] > 1 and each.digest) for each in adapters]
    order = sorted(range(len(adapters)), key=keys.__getitem__)
    members = [adapters[i] for i in order]
    of = tuple(adapter.name for adapter in members)
    if len(members) == 1 and weights is None:
        only = members[0]
        return Adapter(only.name, only.modules, only.base, only.sources or of)
    shares = [1 / len(order)] * len(order) if weights is None else [weights[i] for i in order]
    rank = rank or max(adapter.rank for adapter in members)
    options = Options(rank, density, seed, np.array(shares, np.float64))

    # Modules that share their arrays of inputs (q, k and v) are merged together.
    together: dict[object, list[str]] = {}
    for path in sorted({path for adapter in members for path in adapter.modules}):
        key = tuple(map(id, activations[path])) if activations else path
        together.setdefault(key, []).append(path)
    groups, modules = list(together.values()), dict[str, LoRA]()

    def merge_group(group: Sequence[tuple[str, Sequence[Factors], Options]]) -> dict[str, Factors]:
        """Merge modules with the same inputs, without MLX, whose streams belong to a thread."""
        path, *_ = group[0]
        tokens = [activations[path][i] for i in order] if activations else []
        grams, merged = Grams(tokens) if tokens else None, {}
        for path, factors, own in group:
            a, b = how(factors, replace(own, grams=grams))
            merged[path] = a.astype(np.float32), b.astype(np.float32)
        return merged

    # The matrices are small. Threads of a BLAS that share a busy core wait for each other, up to
    # ten times longer than the work takes. So every core gets modules of its own.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(groups), _GROUPS):
            batch = [[_module(path, members, activations or {}, options) for path in paths]
                     for paths in groups[start : start + _GROUPS]]  # fmt: skip
            for pairs in pool.map(merge_group, batch):
                modules |= {path: LoRA(mx.array(a), mx.array(b)) for path, (a, b) in pairs.items()}
    return Adapter("+".join(of), dict(sorted(modules.items())), members[0].base, of)


def _module(
    path: str, members: Sequence[Adapter], activations: _Activations, options: Options
) -> tuple[str, Sequence[Factors], Options]:
    """A module's path, factors and own options."""
    loras = [adapter.modules.get(path) for adapter in members]
    shapes = sorted({lora.shape for lora in loras if lora is not None})
    if len(shapes) > 1:
        raise AdapterError(
            f"{path}: adapters of different base models cannot be merged: found in, out ="
            f" {' and '.join(map(str, shapes))}"
        )
    ((width, out),) = shapes
    wrong = [x.shape for x in activations.get(path, ()) if x.ndim != 2 or x.shape[1] != width]
    if wrong:
        raise ConfigError(f"activations: {path}: found {wrong[0]}, expected (n_tokens, {width})")
    nothing = np.zeros((width, 0), np.float32), np.zeros((0, out), np.float32)
    seed = zlib.crc32(f"{options.seed} {path}".encode())
    scales = tuple(lora.scale if lora else 1.0 for lora in loras)
    factors = [lora.factors() if lora else nothing for lora in loras]
    return path, factors, replace(options, seed=seed, scales=scales)


def _check(
    adapters: Sequence[Adapter],
    name: str,
    method: MergeMethod,
    density: float,
    rank: int | None,
    weights: Sequence[float] | None,
    activations: _Activations | None,
) -> None:
    """Raise ConfigError with every problem of the options."""
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    missing = [path for path in paths if len((activations or {}).get(path, ())) != len(adapters)]
    bad_weights = weights is not None and (
        len(weights) != len(adapters) or not np.isfinite(weights).all()
    )
    needs = method.reads_inputs and len(adapters) > 1
    rules = {
        "adapters: found none, expected at least one to merge": not adapters,
        f"density: found {density}, expected above 0 and at most 1": not 0 < density <= 1,
        f"rank: found {rank}, expected 1 or more": rank is not None and rank < 1,
        f"weights: {name!r} takes none; 'linear' does": weights is not None and not method.weighted,
        f"weights: found {weights}, expected {len(adapters)} finite numbers": bad_weights,
        f"activations: {name!r} takes none; 'regmean' does": activations is not None
        and not method.reads_inputs,
        f"activations: {name!r} needs {len(adapters)} arrays, one per adapter, for every module;"
        f" {len(missing)} lack them (first: {', '.join(missing[:1])})": needs and missing,
    }
    if problems := [problem for problem, broken in rules.items() if broken]:
        raise ConfigError(problems)


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Multiply an adapter's dW by `scale`, which is folded into b."""
    modules = {
        path: LoRA(lora.a, lora.b.astype(mx.float32) * (scale * lora.scale))
        for path, lora in adapter.modules.items()
    }
    return Adapter(adapter.name, modules, adapter.base, adapter.sources)
