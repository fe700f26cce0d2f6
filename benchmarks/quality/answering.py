"""Greedy answers of many adapters to held-out rows, in batches, each adapter and task once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import batch_generate

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.heldout import max_answer_tokens
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.utils.files import write_json


class Answers:
    """Answers to the same rows of every task, kept in a directory."""

    def __init__(
        self, directory: Path, sets: Sequence[ExampleSet], model: str | None, workers: Workers
    ) -> None:
        """Load a base model of its own: evaluations leave their adapters attached to theirs.

        Args:
            directory: has `<adapter's digest>.json`, task -> answers.
            sets: held-out rows of every task.
            model: see `locate.resolve_model`.
            workers: what answers, a share of the rows each.
        """
        self._directory, self._base, self._workers = directory, Model(model), workers
        self._sets = {one.task: one for one in sets}

    def of(self, adapter: Adapter | None, tasks: Sequence[str]) -> dict[str, list[str]]:
        """Task -> one answer per row under an adapter, None for the bare base model."""
        path = self._directory / f"{adapter.digest if adapter else 'base'}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing = [self._sets[task] for task in tasks if task not in known]
        if missing:
            known |= batched_answers(self._base, adapter, missing, self._workers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        return {task: known[task] for task in tasks}

    def serving(self, serves: Mapping[str, Adapter | None]) -> dict[str, list[str]]:
        """Task -> one answer per row under the adapter that serves it, None for the base model."""
        groups: dict[str | None, list[str]] = {}
        for task, adapter in serves.items():
            groups.setdefault(adapter and adapter.digest, []).append(task)
        found = {}
        for tasks in groups.values():
            found |= self.of(serves[tasks[0]], tasks)
        return found


@dataclass(frozen=True)
class _Share:
    """Rows of some tasks for one worker: `(task, row, example)`."""

    rows: Sequence[tuple[str, int, Example]]

    @property
    def n_tokens(self) -> int:
        return sum(len(x.tokens) for _, _, x in self.rows)


def batched_answers(
    base: Model, adapter: Adapter | None, sets: Sequence[ExampleSet], workers: Workers
) -> dict[str, list[str]]:
    """mlx-lm's `batch_generate`, rows of alike length side by side, a share of them per worker.

    Prompts in a batch are padded, so that an answer may differ from the one alone where two tokens
    are as likely but for rounding.
    """
    rows = [(one.task, i, x) for one in sets for i, x in enumerate(one.examples)]
    rows.sort(key=lambda row: row[2].offset)
    base.attach(adapter, fold=base.can_fold)

    def generate(share: _Share) -> list[list[int]]:
        found = batch_generate(
            base.model,
            base.tokenizer,
            [list(x.tokens[: x.offset]) for _, _, x in share.rows],
            max_tokens=[max_answer_tokens(x) for _, _, x in share.rows],
            return_token_ids=True,
            stream=mx.default_stream(mx.default_device()),
        )
        return found.token_ids

    shares = [_Share(rows[i :: workers.n]) for i in range(min(workers.n, len(rows)))]
    answers = {one.task: [""] * len(one.examples) for one in sets}
    for place, found in workers.run(lambda some: [generate(one) for one in some], shares):
        for (task, i, _), tokens in zip(shares[place].rows, found):
            answers[task][i] = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers
