"""A task that has no adapter yet, what one can be made of, and training on its rows."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.refine.training import Parameters, TrainOptions, descend, pull_back
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import VERSION, all_cores
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import fingerprint, remove_dir, write_dir
from d2c_mlx.utils.progress import Progress

__all__ = [
    "TRAINING",
    "Kept",
    "NewTask",
    "Trainer",
    "as_adapter",
    "as_factors",
    "mix",
    "new_lora",
]

# Bytes of trained adapters that a directory keeps.
_MOST_BYTES = 2 << 30
# How a LoRA is trained on the rows of a new task.
TRAINING = TrainOptions(steps=25, rate=5e-3)

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
    factors: Factors = {}
    for path, lora in sorted(adapter.modules.items()):
        a, b = lora.factors()
        factors[path] = mx.array(a)[None], mx.array(b)[None]
    return factors


def as_adapter(name: str, factors: Factors) -> Adapter:
    """The adapter of these factors; `as_factors` turned round."""
    return Adapter(name, {path: LoRA(a[0], b[0]) for path, (a, b) in factors.items()})


@dataclass(frozen=True)
class Trainer:
    """Trains on one base model; on one machine always to the same bytes.

    Attributes:
        base: base model; an adapter stays attached.
        options: how to train.
        progress: shows progress.
    """

    base: Model
    options: TrainOptions = TRAINING
    progress: Progress = field(default_factory=Progress)

    def lora(self, start: Adapter, rows: ExampleSet) -> Adapter:
        """Train an adapter from `start` on, such as a `new_lora` or a mix; see `fit`."""
        factors = self.fit(as_factors(start), lambda factors: factors, rows)
        return replace(start, modules=as_adapter("", factors).modules)

    def fit(
        self,
        start: Parameters,
        make: Callable[[Parameters], Factors],
        rows: ExampleSet,
        gradient: Gradient | None = None,
    ) -> Parameters:
        """Train numbers that factors are made of on the answers of rows.

        Args:
            start: the numbers at the beginning.
            make: makes the factors, by operations of MLX.
            rows: prompts with answers.
            gradient: what is followed; None takes that of the mean NLL per target.

        Raises:
            ModelError: the architecture scales or caps its logits.
        """

        def of_answers(
            model: Distiller, parameters: Parameters, step: Sequence[TeacherRow]
        ) -> Parameters:
            share = 1 / sum(row.example.n_targets for row in step)
            by_factor = model.gradient(make(parameters), step, [(share, 0.0)] * len(step))
            return pull_back(make, parameters, by_factor)

        o, model, follow = self.options, Distiller(self.base), gradient or of_answers
        self.base.attach(as_adapter("", make(start)))
        sets = [((o.seed,), model.own_rows(rows))]

        def step(parameters: Parameters, turns: list[list[TeacherRow]]) -> Parameters:
            return follow(model, parameters, turns[0])

        with all_cores():
            steps = descend(start, step, sets, o, o.rate or 0.0, self.progress)
            (parameters,) = deque(steps, maxlen=1)
        return parameters


class Kept:
    """Adapters that were made, by all that decides their bytes: a stopped command goes on.

    A directory keeps 2 GiB of them and those of this process; what was not used for longest goes.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Keep them in memory and, with a directory, beyond this process."""
        self._directory, self._mine = directory, dict[str, Adapter]()

    def get(self, parts: Sequence[object], n_layers: int, make: Callable[[], Adapter]) -> Adapter:
        """The adapter of these parts, made once.

        Args:
            parts: all that decides the adapter's bytes beside software and device, as JSON values.
            n_layers: number of transformer blocks of the base model.
            make: makes it.
        """
        key = fingerprint([VERSION, *arithmetic().values(), *parts])[:32]
        if key not in self._mine and self._directory:
            with contextlib.suppress(AdapterError, OSError):
                self._mine[key] = read_adapter(self._directory / key)
                os.utime(self._directory / key)
        if key not in self._mine:
            self._mine[key] = make()
            if self._directory:
                self._write(self._directory, key, n_layers)
        return self._mine[key]

    def _write(self, folder: Path, key: str, n_layers: int) -> None:
        with write_dir(folder / key) as directory:
            self._mine[key].save(directory, n_layers)
        total = 0
        with contextlib.suppress(OSError):  # Another process may remove the same.
            for path in sorted(folder.glob("[!.]*"), key=lambda path: -path.stat().st_mtime_ns):
                total += sum(file.stat().st_size for file in path.iterdir())
                if total > _MOST_BYTES and path.name not in self._mine:
                    remove_dir(path)


@dataclass(frozen=True)
class NewTask:
    """What a method makes an adapter of, besides the rows that it is given.

    Attributes:
        name: name of the task, and of every adapter that is made for it.
        base: the base model.
        scorer: evaluates and caches losses on the base model.
        library: the adapters to compose from, at least one.
        similarity: `(n,)` cosines of the new task's prompts with those of each adapter's tasks;
            None where the prompts of the library are not known.
        training: how LoRAs are trained, and the seed of all other random choices.
        kept: keeps what was trained.
    """

    name: str
    base: Model
    scorer: Scorer
    library: Sequence[Adapter]
    similarity: np.ndarray | None = None
    training: TrainOptions = TRAINING
    kept: Kept = field(default_factory=Kept)

    @property
    def rank(self) -> int:
        """The rank of what is made: the largest of the library."""
        return max(adapter.rank for adapter in self.library)

    @property
    def start(self) -> Adapter:
        """A new LoRA on every module that an adapter of the library changes."""
        shapes: dict[str, tuple[int, int]] = {}
        for adapter in self.library:
            shapes |= {path: lora.shape for path, lora in adapter.modules.items()}
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

    def mixed(self, adapters: Sequence[Adapter], weights: np.ndarray | None = None) -> Adapter:
        """The `mix` of adapters, of `rank`, without weights their mean; mixed once."""
        if weights is None:
            weights = np.full(len(adapters), 1 / len(adapters))
        parts = ["mix", [adapter.digest for adapter in adapters], weights.tolist(), self.rank]
        mixture = self.kept.get(
            parts, self.base.n_layers, lambda: mix(adapters, weights, self.rank).uniform()
        )
        sources = tuple(adapter.name for adapter in adapters)
        return replace(mixture, name=self.name, sources=sources)

    def trained(self, start: Adapter, rows: ExampleSet) -> Adapter:
        """An adapter trained on rows from `start` on; the same arguments train once."""
        return self.fit("lora", [start], rows, lambda trainer: trainer.lora(start, rows))

    def fit(
        self,
        how: str,
        of: Sequence[Adapter],
        rows: ExampleSet,
        make: Callable[[Trainer], Adapter],
        rate: float | None = None,
    ) -> Adapter:
        """What `make` trains on rows; the same `how`, adapters, rows and options train once.

        Args:
            how: names the way of training.
            of: the adapters that it starts from.
            rows: prompts with answers.
            make: trains it.
            rate: learning rate; None is that of `training`.
        """
        options = replace(self.training, rate=rate or self.training.rate)
        digests = [adapter.digest for adapter in of]
        parts = [how, self.base.fingerprint, digests, rows.tokens_digest, asdict(options)]
        trainer = Trainer(self.base, options, self.scorer.progress)
        adapter = self.kept.get(parts, self.base.n_layers, lambda: make(trainer))
        return replace(adapter, name=self.name)
