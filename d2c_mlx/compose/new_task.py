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
from d2c_mlx.compose.mixing import mix
from d2c_mlx.compose.train import Trainer, TrainOptions, new_lora, train_lora
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import fingerprint, remove_dir, write_dir

__all__ = ["Kept", "NewTask"]

# Bytes of trained adapters that a directory keeps.
_MOST_BYTES = 2 << 30


class Kept:
    """Adapters that were made, by all that decides their bytes: a stopped command goes on.

    A directory keeps 2 GiB of them and those of this process; what was not used for longest goes.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Keep them in memory and, with a directory, beyond this process."""
        self._directory, self._known = directory, dict[str, Adapter]()

    def get(self, parts: Sequence[object], n_layers: int, make: Callable[[], Adapter]) -> Adapter:
        """The adapter of these parts, made once.

        Args:
            parts: all that decides the adapter's bytes beside software and device, as JSON values.
            n_layers: number of transformer blocks of the base model.
            make: makes it.
        """
        key = fingerprint([VERSION, *arithmetic().values(), *parts])[:32]
        if key not in self._known:
            self._known[key] = self._read(key) or self._write(key, n_layers, make())
        return self._known[key]

    def _read(self, key: str) -> Adapter | None:
        if not self._directory:
            return None
        try:
            found = read_adapter(self._directory / key)
            os.utime(self._directory / key)
        except (AdapterError, OSError):
            return None
        return found

    def _write(self, key: str, n_layers: int, adapter: Adapter) -> Adapter:
        if self._directory:
            with write_dir(self._directory / key) as directory:
                adapter.save(directory, n_layers)
            self._known[key] = adapter
            # Another process may remove the same.
            with contextlib.suppress(OSError):
                self._trim(self._directory)
        return adapter

    def _trim(self, directory: Path) -> None:
        total = 0
        kept = sorted(directory.glob("[!.]*"), key=lambda one: one.stat().st_mtime_ns)
        for one in reversed(kept):
            total += sum(file.stat().st_size for file in one.iterdir())
            if total > _MOST_BYTES and one.name not in self._known:
                remove_dir(one)


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
        return max(one.rank for one in self.library)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Path -> (in, out) of every module that an adapter of the library changes."""
        return {path: lora.shape for one in self.library for path, lora in one.modules.items()}

    def losses(self, adapters: Sequence[Adapter | None], rows: ExampleSet) -> np.ndarray:
        """Mean NLL per target token of each adapter on some rows, `(n,)` in nats.

        Args:
            adapters: None is the base model.
            rows: evaluated in their parts, each of which is cached.
        """
        jobs = [(one, [rows]) for one in adapters]
        return np.concatenate(self.scorer.losses_in_parts(jobs))

    def mixed(self, adapters: Sequence[Adapter], weights: np.ndarray) -> Adapter:
        """The `mix` of adapters, of `rank`; the same arguments are mixed once."""
        parts = ["mix", [one.digest for one in adapters], weights.tolist(), self.rank]
        found = self.kept.get(parts, self.base.n_layers,
                              lambda: mix(adapters, weights, self.rank).uniform())  # fmt: skip
        return replace(found, name=self.name, sources=tuple(one.name for one in adapters))

    def trained(self, start: Adapter, rows: ExampleSet) -> Adapter:
        """An adapter trained on rows from `start` on; the same arguments train once."""
        return self.made("lora", [start], rows, lambda trainer: train_lora(
            trainer.base, start, rows, trainer.options, trainer.progress))  # fmt: skip

    def made(
        self, how: str, of: Sequence[Adapter], rows: ExampleSet,
        make: Callable[[Trainer], Adapter], rate: float | None = None,
    ) -> Adapter:  # fmt: skip
        """What `make` trains on rows; the same `how`, adapters, rows and options train once.

        Args:
            how: names the way of training.
            of: the adapters that it starts from.
            rows: prompts with answers.
            make: trains it.
            rate: learning rate; None is that of `training`.
        """
        options = replace(self.training, rate=rate or self.training.rate)
        parts = [how, self.base.fingerprint, [one.digest for one in of], rows.tokens_digest,
                 asdict(options)]  # fmt: skip
        trainer = Trainer(self.base, options, self.scorer.progress)
        found = self.kept.get(parts, self.base.n_layers, lambda: make(trainer))
        return replace(found, name=self.name)

    def fresh(self, rows: ExampleSet) -> Adapter:
        """A new LoRA trained on rows alone."""
        return self.trained(new_lora(self.name, self.shapes, self.rank, self.training.seed), rows)
