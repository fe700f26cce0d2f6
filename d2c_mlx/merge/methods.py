"""Merging adapters on dW, with any ranks and target modules.

A method is a function of one module's factors and of `Options`, wrapped in a `MergeMethod` that
says what a merge must know of it. Each function names its paper, docs/reference/merge-methods.md
says when to use which. They are in combine.py; other packages add theirs by entry points.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import CoreSpace, Factors, factorise, to_core
from d2c_mlx.merge.combine import Grams, regmean, ties, tsv
from d2c_mlx.plugins import MERGE_METHODS, find, readonly
from d2c_mlx.utils.errors import AdapterError, ConfigError

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

    def merge(factors: Sequence[Factors], options: Options) -> Factors:
        """Merge one module by the plug-in, which cannot change the factors."""
        width, out = len(factors[0][0]), factors[0][1].shape[1]
        most = sum(len(b) for _, b in factors) if method.sums_ranks else options.rank
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

    return replace(method, merge=merge)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str = "linear",
    density: float = 0.5,
    rank: int | None = None,
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    activations: Mapping[str, Sequence[np.ndarray]] | None = None,
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
        activations: module path -> its inputs `(n_tokens, in)`, one array per adapter in the order
            of `adapters`, also for adapters without the module; for `regmean` and others that read
            them, see `evaluate.capture.input_activations`.

    Returns:
        An adapter of float32 factors with scale 1, named after the sorted members.

    Raises:
        ConfigError: the method is unknown, an option is out of range, or the method needs an option
            that is missing or takes none of that name.
        AdapterError: a module has different shapes, so the adapters are of different base models.
        D2CError: a plug-in failed, or returned what is no merge.
    """
    how, n, inputs = find_method(method), len(adapters), activations or {}
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    missing = [path for path in paths if len(inputs.get(path, ())) != n]
    unreadable = activations is not None and not how.reads_inputs
    good_weights = weights is None or (len(weights) == n and bool(np.isfinite(weights).all()))
    rules = {
        "adapters: found none, expected at least one to merge": not adapters,
        f"density: found {density}, expected above 0 and at most 1": not 0 < density <= 1,
        f"rank: found {rank}, expected 1 or more": rank is not None and rank < 1,
        f"weights: {method!r} takes none; 'linear' does": weights is not None and not how.weighted,
        f"weights: found {weights}, expected {n} finite numbers": not good_weights,
        f"activations: {method!r} takes none; 'regmean' does": unreadable,
        f"activations: {method!r} needs {n} arrays, one per adapter, for every module;"
        f" {len(missing)} lack them (first: {', '.join(missing[:1])})": how.reads_inputs
        and n > 1
        and missing,
    }
    if problems := [problem for problem, broken in rules.items() if broken]:
        raise ConfigError(problems)
    # By name, then by content; only equal names cost a digest of all bytes.
    counts = Counter(adapter.name for adapter in adapters)
    keys = [(each.name, counts[each.name] > 1 and each.digest) for each in adapters]
    order = sorted(range(n), key=keys.__getitem__)
    members, names = [adapters[i] for i in order], tuple(adapters[i].name for i in order)
    if n == 1 and weights is None:
        only = members[0]
        return Adapter(only.name, only.modules, only.base, only.sources or names)
    shares = np.array([1 / n if weights is None else weights[i] for i in order], np.float64)
    rank = rank or max(adapter.rank for adapter in members)
    inputs = {path: [arrays[i] for i in order] for path, arrays in inputs.items()}
    merged = _merge_modules(members, how, Options(rank, density, seed, shares), inputs)
    return Adapter("+".join(names), merged, members[0].base, names)


def _merge_modules(
    members: Sequence[Adapter],
    how: MergeMethod,
    options: Options,
    inputs: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, LoRA]:
    # Modules that share their arrays of inputs (q, k and v) are merged together.
    together: dict[object, list[str]] = {}
    for path in sorted({path for adapter in members for path in adapter.modules}):
        together.setdefault(tuple(map(id, inputs.get(path, ()))) or path, []).append(path)
    groups, modules = list(together.values()), dict[str, LoRA]()

    def read(path: str) -> tuple[str, list[Factors], Options]:
        """A module's path, factors and own options."""
        loras = [adapter.modules.get(path) for adapter in members]
        shapes = sorted({lora.shape for lora in loras if lora is not None})
        if len(shapes) > 1:
            raise AdapterError(
                f"{path}: adapters of different base models cannot be merged: found in, out ="
                f" {' and '.join(map(str, shapes))}"
            )
        ((width, out),) = shapes
        wrong = [x.shape for x in inputs.get(path, ()) if x.ndim != 2 or x.shape[1] != width]
        if wrong:
            problem = f"found {wrong[0]}, expected (n_tokens, {width})"
            raise ConfigError(f"activations: {path}: {problem}")
        seed = zlib.crc32(f"{options.seed} {path}".encode())
        scales = tuple(lora.scale if lora else 1.0 for lora in loras)
        factors = factors_of(members, path, (width, out))
        return path, factors, replace(options, seed=seed, scales=scales)

    def merge_group(group: Sequence[tuple[str, list[Factors], Options]]) -> dict[str, Factors]:
        """Merge modules with the same inputs, without MLX, whose streams belong to a thread."""
        tokens = inputs.get(group[0][0])
        grams = Grams(tokens) if tokens else None
        return {path: how(factors, replace(o, grams=grams)) for path, factors, o in group}

    # The matrices are small. Threads of a BLAS that share a busy core wait for each other, up to
    # ten times longer than the work takes. So every core gets modules of its own.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(groups), _GROUPS):
            batch = [list(map(read, group)) for group in groups[start : start + _GROUPS]]
            for pairs in pool.map(merge_group, batch):
                for path, factors in pairs.items():
                    a, b = (mx.array(x.astype(np.float32)) for x in factors)
                    modules[path] = LoRA(a, b)
    return dict(sorted(modules.items()))


def factors_of(adapters: Sequence[Adapter], path: str, shape: tuple[int, int]) -> list[Factors]:
    """The factors of a module `(in, out)`, without columns where an adapter lacks it."""
    nothing = np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32)
    loras = [adapter.modules.get(path) for adapter in adapters]
    return [lora.factors() if lora else nothing for lora in loras]


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """Multiply an adapter's dW by `scale`, which is folded into b."""
    modules = {
        path: LoRA(lora.a, lora.b.astype(mx.float32) * (scale * lora.scale))
        for path, lora in adapter.modules.items()
    }
    return Adapter(adapter.name, modules, adapter.base, adapter.sources)
