"""A task that has no adapter yet, and what one can be made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compose.train import Trainer, TrainOptions, new_lora
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import fingerprint, remove_dir, write_dir

__all__ = ["Kept", "NewTask", "mix"]

# Bytes of trained adapters that a directory keeps.
_MOST_BYTES = 2 << 30


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
        if key in self._mine:
            return self._mine[key]
        if self._directory:
            with contextlib.suppress(AdapterError, OSError):
                self._mine[key] = read_adapter(self._directory / key)
                os.utime(self._directory / key)
                return self._mine[key]
        self._mine[key] = adapter = make()
        if self._directory:
            with write_dir(self._directory / key) as directory:
                adapter.save(directory, n_layers)
            with contextlib.suppress(OSError):  # Another process may remove the same.
                self._trim(self._directory)
        return adapter

    def _trim(self, directory: Path) -> None:
        total = 0
        oldest_first = sorted(directory.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
        for path in reversed(oldest_first):
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
    base: BaseModel
    scorer: Scorer
    library: Sequence[Adapter]
    similarity: np.ndarray | None = None
    training: TrainOptions = TrainOptions()
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
        return np.concatenate(self.scorer.losses_in_parts(jobs))

    def mixed(self, adapters: Sequence[Adapter], weights: np.ndarray) -> Adapter:
        """The `mix` of adapters, of `rank`; the same arguments are mixed once."""
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
