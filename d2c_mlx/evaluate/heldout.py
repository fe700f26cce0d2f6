"""Held-out rows: losses of every method at the bytes it takes, and greedy answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from d2c_mlx.models.rows import Row, row_format
from d2c_mlx.utils.progress import Progress

if TYPE_CHECKING:  # A report scores answers without MLX.
    from d2c_mlx.adapters.adapter import Adapter
    from d2c_mlx.evaluate.scorer import Scorer
    from d2c_mlx.models.examples import Example, ExampleSet
    from d2c_mlx.models.model import Model


# Rows whose adapters are in memory together. mlx-lm generates for 32 of them at a time.
_ANSWERED_AT_ONCE = 64


@dataclass(frozen=True)
class BenchMethod:
    """One row of a comparison: which adapter serves each task, and at how many bytes.

    Attributes:
        nbytes: bytes of all adapter files.
        variants: each maps task -> the adapter that serves it, or None for the bare base model.
            Losses are means over variants: `random` has several partitions, all others one.
    """

    nbytes: int
    variants: Sequence[Mapping[str, Adapter | None]]


def row_losses(
    scorer: Scorer, serves: Mapping[str, Adapter | None], tests: Sequence[ExampleSet]
) -> dict[str, np.ndarray]:
    """Losses of single held-out rows under what serves each task; None is the base model.

    Returns:
        Task -> `(n_rows, 2)`: the NLL of the row's targets in nats, and their number.
    """
    jobs = [(serves[test.task], [test]) for test in tests]
    return {
        test.task: np.stack([sums, [row.n_targets for row in test.examples]], axis=1)
        for test, (sums,) in zip(tests, scorer.row_losses(jobs, in_parts=True))
    }


def method_losses(scorer: Scorer, method: BenchMethod, tests: Sequence[ExampleSet]) -> np.ndarray:
    """Mean NLL per target token of one method on every task, `(n_tasks,)` in nats."""
    variants = [row_losses(scorer, variant, tests).values() for variant in method.variants]
    sums = np.array([[rows.sum(axis=0) for rows in variant] for variant in variants])
    return (sums[..., 0] / sums[..., 1]).mean(axis=0)


def bench_methods(
    scorer: Scorer, methods: Mapping[str, BenchMethod], tests: Sequence[ExampleSet]
) -> dict[str, Any]:
    """Compare methods on held-out rows: the `methods` part of `bench.json`.

    excess = loss - individual, in nats per target token. kept = (base - loss) / (base -
    individual) is null where the individual adapter does not beat the base. A method's numbers are
    means over tasks.

    Args:
        scorer: on the base model.
        methods: must have "base"; without "individual" there is neither excess nor kept.
        tests: held-out examples of every task.

    Returns:
        Method -> `nbytes`, `loss`, `excess`, `kept`, and `tasks` with the last three by task.
    """
    losses = {name: method_losses(scorer, method, tests) for name, method in methods.items()}
    base = losses["base"]
    # NaN here is null in the file: without an individual adapter nothing is known.
    individual = losses.get("individual", np.full(len(tests), np.nan))
    gain = np.where(base - individual > 1e-6, base - individual, np.nan)
    result: dict[str, Any] = {}
    for name, loss in losses.items():
        columns = {"loss": loss, "excess": loss - individual, "kept": (base - loss) / gain}

        def means(of: slice, columns: Mapping[str, np.ndarray] = columns) -> dict[str, Any]:
            values = {key: column[of][~np.isnan(column[of])] for key, column in columns.items()}
            return {key: float(x.mean()) if len(x) else None for key, x in values.items()}

        tasks = {test.task: means(slice(i, i + 1)) for i, test in enumerate(tests)}
        all_tasks = means(slice(None))
        result[name] = {"nbytes": methods[name].nbytes, **all_tasks, "tasks": tasks}
    return result


def paired_bootstrap(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], n: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """The difference of two packs' losses on the same held-out rows, by resampling the rows.

    Rows are drawn within every task, the same for both; tasks are not drawn, so nothing is said of
    other tasks. Source: https://aclanthology.org/W04-3250.

    Args:
        ours: task -> `(n_rows, 2)`, see `row_losses`.
        theirs: the same tasks and rows.
        n: number of resamples.
        seed: of the draws.

    Returns:
        `difference`: our loss less theirs, in nats per target token, the mean over tasks; below 0
        ours is better. `low`, `high`: its 2.5 and 97.5 % quantiles over resamples, None where a
        task has fewer than two rows, which would be the same in every resample.
    """
    rng = np.random.default_rng(seed)
    difference, drawn = 0.0, np.zeros(n)
    for task in sorted(ours):
        a, b = ours[task], theirs[task]
        counts = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=n)
        for sign, rows in ((1, a), (-1, b)):
            difference += sign * float(rows[:, 0].sum()) / float(rows[:, 1].sum()) / len(ours)
            sums = counts @ rows
            drawn += sign * sums[:, 0] / sums[:, 1] / len(ours)
    if min(map(len, ours.values())) < 2:
        return {"difference": difference, "low": None, "high": None}
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"difference": difference, "low": float(low), "high": float(high)}


def answer_rows(
    model: Model,
    methods: Mapping[str, BenchMethod],
    tasks: Iterable[tuple[Sequence[Row], ExampleSet]],
    progress: Progress | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Greedy answers to some rows of tasks under every method's first variant.

    An answer is cut after `max_answer_tokens`.

    Args:
        model: the base model.
        methods: name -> what serves the tasks.
        tasks: of each task rows as read, and the same rows tokenized, and maybe more. Rows in
            mlx-lm's `text` format have no prompt, and so no answer.
        progress: shows progress; None shows nothing.

    Returns:
        Task -> for each row `prompt`, `expected`, and each method's answer.
    """
    progress = progress or Progress()
    answered: dict[str, list[dict[str, str]]] = {}
    # The row, its tokens, the methods that an adapter serves it in, and that adapter.
    asked: list[tuple[dict[str, str], Example, list[str], Adapter | None]] = []
    for rows, examples in tasks:
        prompts = rows if rows and row_format(rows[0]) != ("text",) else ()
        answered[examples.task] = [prompt_and_expected(row) for row in prompts]
        serving: dict[str, tuple[list[str], Adapter | None]] = {}
        for name, method in methods.items():
            adapter = method.variants[0][examples.task]
            serving.setdefault(adapter.digest if adapter else "", ([], adapter))[0].append(name)
        for names, adapter in serving.values():
            asked += zip(answered[examples.task], examples.examples, repeat(names), repeat(adapter))
    most = [max_answer_tokens(example) for _, example, *_ in asked]
    progress.expect(sum(most))
    # Rows under the same adapter stand together, so that a batch has few adapters.
    asked.sort(key=lambda entry: entry[3].digest if entry[3] else "")
    for i in range(0, len(asked), _ANSWERED_AT_ONCE):
        batch = asked[i : i + _ANSWERED_AT_ONCE]
        tokenized = [example.prompt_tokens for _, example, *_ in batch]
        most = [max_answer_tokens(example) for _, example, *_ in batch]
        answers = model.answers(tokenized, most, [adapter for *_, adapter in batch])
        for (row, _, names, _), tokens in zip(batch, answers):
            text = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            row.update(dict.fromkeys(names, text))
        progress.advance(sum(most))
    return answered


def max_answer_tokens(example: Example) -> int:
    """Tokens after which an answer is cut, since by then it is wrong."""
    return 2 * example.n_targets + 16


def prompt_and_expected(row: Row) -> dict[str, str]:
    """A row's last user message as `prompt`, and its answer as `expected`."""
    if row_format(row) == ("messages",):
        asked = [message["content"] for message in row["messages"][:-1]]
        return {"prompt": asked[-1] if asked else "", "expected": row["messages"][-1]["content"]}
    return {"prompt": row["prompt"], "expected": row["completion"]}


def right_answers(
    answers: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> dict[str, float]:
    """Method -> the share of its answers that are as expected, a mean over tasks; {} without any.

    Args:
        answers: task -> `answer_rows` of it; tasks without answers are left out.
        methods: names among each row's keys.
    """
    tasks, shares = [rows for rows in answers.values() if rows], {}
    for method in methods if tasks else ():
        right = [[same_text(row[method], row["expected"]) for row in rows] for rows in tasks]
        shares[method] = sum(sum(rows) / len(rows) for rows in right) / len(tasks)
    return shares


def same_text(answer: str, expected: str) -> bool:
    """True if both are equal but for case and white space."""
    a, b = (" ".join(text.casefold().split()) for text in (answer, expected))
    return a == b
