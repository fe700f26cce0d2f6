"""A task that has no adapter yet, and the ways to make one, from the simplest to the most complex.

A method is a pure function of a `NewTask`, of some of its rows, and of one number that the rows
decide by cross-validation: a scale of dW, or the index of an adapter. It mixes updates (dW), also
where a paper mixes A and B apart. docs/how-to/new-task.md says in a row what each makes. Other
packages add theirs by entry points (plugins.py), as examples/plugin does those of more papers.
"""

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.plugins import COMPOSE_METHODS, find
from d2c_mlx.refine.refine import Parameters, TrainOptions, descend, pull_back
from d2c_mlx.utils.environment import all_cores

# Scales of dW that the rows choose from. What ten rows teach is worth less than all of it.
SCALES = (0.35, 0.5, 0.7, 1.0)
# Adapters of the library that are mixed where the rows choose them.
_N_TOP = 3

# (model, parameters, rows of the step) -> the gradient, in the form of the parameters.
Gradient = Callable[[Distiller, Parameters, Sequence[TeacherRow]], Parameters]


def mix(adapters: Sequence[Adapter], weights: Sequence[float] | np.ndarray, rank: int) -> Adapter:
    """The sum of `w_i dW_i` as one LoRA, the closest of its rank.

    Args:
        adapters: of any ranks and modules.
        weights: one per adapter; those of weight 0 are left out.
        rank: largest rank of every module of the result.
    """
    used = [(adapter, float(w)) for adapter, w in zip(adapters, weights) if w]
    members, shares = zip(*(used or [(adapters[0], 0.0)]))
    return merge_adapters(members, "linear", rank=rank, weights=shares)


def new_lora(name: str, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int = 0) -> Adapter:
    """A LoRA before its training: `a` uniform within 1 / sqrt(in), as mlx-lm draws it, `b` zero.

    Args:
        name: the adapter's name.
        shapes: module path -> (in, out).
        rank: of every module.
        seed: every module draws its own numbers.
    """
    modules = {}
    for path, (width, out) in sorted(shapes.items()):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        a = rng.uniform(-1, 1, (width, rank)) / np.sqrt(width)
        modules[path] = LoRA(mx.array(a.astype(np.float32)), mx.zeros((rank, out)))
    return Adapter(name, modules)


def as_factors(adapter: Adapter) -> Factors:
    """The factors of an adapter, as `Distiller.gradient` takes them."""
    pairs = {path: lora.factors() for path, lora in sorted(adapter.modules.items())}
    return {path: (mx.array(a)[None], mx.array(b)[None]) for path, (a, b) in pairs.items()}


def as_adapter(name: str, factors: Factors) -> Adapter:
    """The adapter of these factors; `as_factors` turned round."""
    return Adapter(name, {path: LoRA(a[0], b[0]) for path, (a, b) in factors.items()})


@dataclass(frozen=True)
class NewTask:
    """What a method makes an adapter of, besides the rows that it is given.

    On one machine, training always gives the same bytes.

    Attributes:
        name: name of the task.
        base: the base model; an adapter stays attached.
        scorer: evaluates and caches losses on the base model.
        library: the adapters to compose from, at least one.
        similarity: `(n,)` cosines of the new task's prompts with those of each adapter's tasks;
            None where the prompts of the library are not known.
        training: how LoRAs are trained, and the seed of all other random choices.
    """

    name: str
    base: Model
    scorer: Scorer
    library: Sequence[Adapter]
    similarity: np.ndarray | None = None
    training: TrainOptions = TrainOptions(steps=25, rate=5e-3)
    _made: dict[tuple[object, ...], Adapter] = field(default_factory=dict, init=False, repr=False)

    @property
    def rank(self) -> int:
        """The rank of what is made: the largest of the library."""
        return max(adapter.rank for adapter in self.library)

    @property
    def start(self) -> Adapter:
        """A new LoRA on every module that an adapter of the library changes."""
        modules = [item for adapter in self.library for item in adapter.modules.items()]
        shapes = {path: lora.shape for path, lora in modules}
        return new_lora(self.name, shapes, self.rank, self.training.seed)

    def losses(self, adapters: Sequence[Adapter | None], rows: ExampleSet) -> np.ndarray:
        """Mean NLL per target token of each adapter on some rows, `(n,)` in nats.

        Args:
            adapters: None is the base model.
            rows: evaluated in their parts, each of which is cached.
        """
        jobs = [(adapter, [rows]) for adapter in adapters]
        return np.concatenate(self.scorer.losses(jobs, in_parts=True))

    def by_loss(self, rows: ExampleSet) -> list[Adapter]:
        """The adapters of the library, the one with the lowest loss on the rows first."""
        order = np.argsort(self.losses(self.library, rows), kind="stable")
        return [self.library[i] for i in order]

    def once(self, key: tuple[object, ...], make: Callable[[], Adapter]) -> Adapter:
        """What `make` makes; the same key is made once. The key has all that decides its bytes."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def mixed(self, adapters: Sequence[Adapter], weights: np.ndarray | None = None) -> Adapter:
        """The `mix` of adapters, of `rank`, without weights their mean; mixed once."""
        if weights is None:
            weights = np.full(len(adapters), 1 / len(adapters))
        key = ("mix", *weights.tolist(), *(adapter.digest for adapter in adapters))
        return self.once(key, lambda: mix(adapters, weights, self.rank))

    def trained(self, start: Adapter, rows: ExampleSet) -> Adapter:
        """An adapter trained on rows from `start` on; the same arguments train once."""

        def train() -> Adapter:
            factors = self.fit(as_factors(start), lambda factors: factors, rows)
            return replace(start, modules=as_adapter("", factors).modules)

        return self.once(("lora", start.digest, rows.tokens_digest), train)

    def fit(
        self,
        start: Parameters,
        make: Callable[[Parameters], Factors],
        rows: ExampleSet,
        gradient: Gradient | None = None,
        rate: float | None = None,
    ) -> Parameters:
        """Train numbers that factors are made of on the answers of rows.

        Args:
            start: the numbers at the beginning.
            make: makes the factors, by operations of MLX.
            rows: prompts with answers.
            gradient: what is followed; None takes that of the mean NLL per target.
            rate: highest learning rate; None is that of `training`.

        Raises:
            ModelError: the architecture scales or caps its logits.
        """
        model, o = Distiller(self.base), self.training
        self.base.attach(as_adapter("", make(start)))

        def follow(parameters: Parameters, turns: list[list[TeacherRow]]) -> Parameters:
            (step,) = turns
            if gradient:
                return gradient(model, parameters, step)
            share = 1 / sum(row.example.n_targets for row in step)
            by_factor = model.gradient(make(parameters), step, [(share, 0.0)] * len(step))
            return pull_back(make, parameters, by_factor)

        sets, rate = [((o.seed,), model.own_rows(rows))], o.rate if rate is None else rate
        with all_cores():
            steps = descend(start, follow, sets, o, rate or 0.0, self.scorer.progress)
            (parameters,) = deque(steps, maxlen=1)
        return parameters


@dataclass(frozen=True)
class Method:
    """A way to make an adapter, and what has to be known of it before it is called.

    Attributes:
        make: function of the task, rows to learn from, and a choice; it returns the adapter.
        choices: the numbers that cross-validation chooses from; None is the index of every adapter
            of the library.
        needs_prompts: it reads `NewTask.similarity`.
        trains: it follows a gradient, so the base model needs a head that is linear; methods that
            name the same start are trained once.
    """

    make: Callable[[NewTask, ExampleSet, float], Adapter]
    choices: Sequence[float] | None = (1.0,)
    needs_prompts: bool = False
    trains: bool | str = False

    def __call__(self, task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
        """Make the adapter."""
        return self.make(task, rows, choice)


def similarity_weights(
    similarity: np.ndarray, n_nearest: int = 3, temperature: float = 0.2
) -> np.ndarray:
    """Weights of the nearest tasks' adapters, a softmax of their similarities; others have 0.

    Args:
        similarity: `(n,)` cosines of the new task with the tasks of each adapter.
        n_nearest: number of adapters with a weight above 0.
        temperature: similarities are divided by it.

    Returns:
        `(n,)`, with the sum 1.

    Source: LORAUTER, https://arxiv.org/abs/2601.21795.
    """
    nearest = np.argsort(-similarity, kind="stable")[:n_nearest]
    weights = np.zeros(len(similarity))
    weights[nearest] = np.exp((similarity[nearest] - similarity.max()) / temperature)
    return weights / weights.sum()


def _retrieve(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    assert task.similarity is not None, "checked before"
    return task.mixed(task.library, similarity_weights(task.similarity))


def _fresh(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(task.start, rows), choice)


def _fresh_library(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    top = task.by_loss(rows)[:_N_TOP]
    shares = np.array([1.0, *[1 / len(top)] * len(top)])
    return scaled(task.mixed([task.trained(task.start, rows), *top], shares), choice)


# Methods that `auto` compares, the simplest first: of equally good ones the first is taken.
METHODS: dict[str, Method] = {
    "best": Method(lambda task, rows, choice: task.library[int(choice)], None),
    "uniform": Method(lambda task, rows, choice: task.mixed(task.library)),
    "retrieve": Method(_retrieve, needs_prompts=True),
    "top": Method(
        lambda task, rows, choice: scaled(task.mixed(task.by_loss(rows)[:_N_TOP]), choice),
        (*SCALES, 1.4),
    ),
    "fresh": Method(_fresh, trains="fresh"),
    "fresh-scaled": Method(_fresh, SCALES, trains="fresh"),
    "fresh-library": Method(_fresh_library, SCALES, trains="fresh"),
    "best-trained": Method(
        lambda task, rows, choice: scaled(task.trained(task.by_loss(rows)[0], rows), choice),
        SCALES,
        trains=True,
    ),
}


def find_method(name: str) -> Method:
    """The method of a name: a key of `METHODS`, or a plug-in's, whose results are checked.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    plugin = find(COMPOSE_METHODS, name, ("auto", *METHODS))
    loaded = plugin.load()

    def make(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
        adapter, shapes = plugin.call(task, rows, choice), task.base.module_shapes
        if not isinstance(adapter, Adapter) or not all(
            lora.shape == shapes.get(path) and all(np.isfinite(x).all() for x in lora.factors())
            for path, lora in adapter.modules.items()
        ):
            raise plugin.wrong(adapter, f"an Adapter of finite numbers for {task.base.name}")
        return adapter

    return replace(loaded if isinstance(loaded, Method) else Method(loaded), make=make)
