"""Scores of greedy answers to rows of benchmarks/library, by the metric of each kind of task.

| kind | metric | over rows |
|---|---|---|
| gec | F0.5 of edits (ERRANT, https://aclanthology.org/P17-1074) | of the sums |
| qa | F1 of words (SQuAD, arXiv 1606.05250) | mean |
| summ, tone | ROUGE-L (https://aclanthology.org/W04-1013), by rouge-score | mean |
| reply | chrF2 (https://aclanthology.org/W15-3049), by sacrebleu | mean |
| num, date | exact match but for case and white space | mean |

`row_stats` says what one answer adds to the score of its task, `task_score` makes it a score, and
`paired_bootstrap` compares two methods on the same rows, `pooled_bootstrap` several draws of them.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from rapidfuzz.distance import Indel, Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import CHRF

from d2c_mlx.evaluate.heldout import right_answers, same_text

__all__ = ["METRIC_OF", "answer_metrics", "paired_bootstrap", "pooled_bootstrap", "row_stats",
           "source_edits", "task_score"]  # fmt: skip

METRIC_OF = {"gec": "F0.5", "qa": "F1", "summ": "ROUGE-L", "reply": "chrF", "tone": "ROUGE-L",
             "num": "exact match", "date": "exact match"}  # fmt: skip

Edit = tuple[int, int, tuple[str, ...]]


class Words(Tokenizer):
    """Words in any script: rouge-score's own tokenizer knows a-z and 0-9 alone."""

    def tokenize(self, text: str) -> list[str]:
        """Words without case and punctuation, as `word_f1` counts them."""
        return re.findall(r"\w+", text.casefold())


ROUGE = RougeScorer(["rougeL"], tokenizer=Words())
CHRF2 = CHRF()


def row_stats(task: str, prompt: str, expected: str, answer: str) -> tuple[float, ...]:
    """The contribution of the answer to one row to the score of its task.

    Args:
        task: `<kind>-<language>`.
        prompt: what the user said; only gec reads it.
        expected: the row's own answer.
        answer: what was answered.

    Returns:
        gec: edits of the answer that the expected one has, that it has not, and that are missing
        (tp, fp, fn). Others: one value from 0 to 1.
    """
    metric = METRIC_OF[_kind(task)]
    if metric == "F0.5":
        _, found, source = prompt.partition(": ")
        if not found:
            raise ValueError(f"{task}: no sentence after a colon in {prompt!r}")
        ours, theirs = (Counter(source_edits(source, text)) for text in (answer, expected))
        hits = (ours & theirs).total()
        return float(hits), float(ours.total() - hits), float(theirs.total() - hits)
    if metric == "F1":
        return (word_f1(answer, expected),)
    if metric == "ROUGE-L":
        return (_rouge(answer, expected),)
    if metric == "chrF":
        return (CHRF2.sentence_score(answer, [expected]).score / 100,)
    return (float(same_text(answer, expected)),)


def word_f1(heard: str, expected: str) -> float:
    """F1 of words in any case and order: 2 x common / all; 1 where both texts have none."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (heard, expected))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def answer_metrics(
    answers: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Method -> exact match and chrF of its answers in percent, means over tasks; {} without any.

    Args:
        answers: task -> `answer_rows` of it.
        methods: names among each row's keys.
    """
    tasks, result = [rows for rows in answers.values() if rows], {}
    for method, share in right_answers(answers, methods).items():
        scores = [CHRF2.corpus_score([row[method] for row in rows],
                                     [[row["expected"] for row in rows]]).score
                  for rows in tasks]  # fmt: skip
        result[method] = {"exact_match": 100 * share, "chrf": sum(scores) / len(scores)}
    return result


def _kind(task: str) -> str:
    return task.split("-")[0]


def _rouge(answer: str, expected: str) -> float:
    """ROUGE-L's F; 1 where both have no word, which rouge-score calls 0 and `word_f1` 1."""
    if not Words().tokenize(answer + expected):
        return 1.0
    return float(ROUGE.score(expected, answer)["rougeL"].fmeasure)


def source_edits(source: str, target: str) -> list[Edit]:
    """The edits that make one sentence another: (start, end, replacement) in tokens of the source.

    ERRANT without its English: tokens are words and single marks, the alignment is Levenshtein's,
    and neighbouring edits are merged by those rules of its merger that ask no tagger
    (https://github.com/chrisjbryant/errant, errant/en/merger.py). Case counts, white space does
    not. Which of two equal neighbours was put in is the aligner's choice.
    """
    before, after = (re.findall(r"\w+|[^\w\s]", text) for text in (source, target))
    edits: list[Edit] = []
    steps = Levenshtein.opcodes(before, after)
    for same, group in groupby(steps, lambda step: step.tag == "equal"):
        if not same:
            run = list(group)
            start, old = run[0].src_start, before[run[0].src_start : run[-1].src_end]
            edits += _parts(start, old, after[run[0].dest_start : run[-1].dest_end])
    return edits


def _parts(start: int, old: list[str], new: list[str]) -> list[Edit]:
    """The edits of a run of changed tokens, the first of which is the source's `start`-th."""
    # Put in, left out, or another cut between words: `acat` for `a cat`.
    if not old or not new or _letters(old) == _letters(new):
        return [(start, start + len(old), tuple(new))]
    # Two errors side by side.
    if len(old) == len(new):
        return [(start + i, start + i + 1, (word,)) for i, word in enumerate(new)]
    # A misspelt word beside one put in or left out.
    if _alike(old[0], new[0]):
        return [(start, start + 1, (new[0],)), *_parts(start + 1, old[1:], new[1:])]
    if _alike(old[-1], new[-1]):
        end = start + len(old)
        return [*_parts(start, old[:-1], new[:-1]), (end - 1, end, (new[-1],))]
    return [(start, start + len(old), tuple(new))]


def _letters(tokens: list[str]) -> str:
    return re.sub("['’-]", "", "".join(tokens).casefold())


def _alike(a: str, b: str) -> bool:
    """ERRANT's threshold."""
    return Indel.normalized_similarity(a, b) > 0.75


def task_score(task: str, stats: np.ndarray) -> float:
    """Score of a task in percent.

    Args:
        task: `<kind>-<language>`.
        stats: (rows, d), what `row_stats` says of every row.

    Returns:
        0 to 100. gec: F0.5 of all edits, 100 where there are none; others: the mean.
    """
    stats = np.asarray(stats, dtype=float)
    if stats.ndim != 2 or not len(stats):
        raise ValueError(f"{task}: stats of rows expected, not of shape {stats.shape}")
    return float(_scores(task, stats))


def _scores(task: str, stats: np.ndarray) -> np.ndarray:
    """`task_score` over the last two axes."""
    if METRIC_OF[_kind(task)] != "F0.5":
        return 100 * stats[..., 0].mean(axis=-1)
    hits, wrong, missed = np.moveaxis(stats.sum(axis=-2), -1, 0)
    # (1 + b^2) P R / (b^2 P + R) for b = 0.5, without dividing by what may be 0.
    weighed = 1.25 * hits
    total = weighed + wrong + 0.25 * missed
    return 100 * np.where(total > 0, weighed / np.where(total > 0, total, 1), 1.0)


def paired_bootstrap(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], n: int = 1000, seed: int = 0
) -> dict[str, float]:
    """`pooled_bootstrap` of one pair."""
    return pooled_bootstrap([(ours, theirs)], n, seed)


def pooled_bootstrap(
    pairs: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    n: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """The lead of one method over another on the same rows, by resampling them.

    Paired bootstrap, https://aclanthology.org/W04-3250. Rows are drawn within every task, the same
    for both methods and all pairs; tasks are not drawn, so nothing is said of other tasks, nor of
    other draws of what the pairs differ in.

    Args:
        pairs: of draws of both methods, whose differences are averaged: ours, task -> (rows, d),
            what `row_stats` says of every row; theirs, the same tasks and rows.
        n: resamples.
        seed: of the draws; the order of the tasks does not matter.

    Returns:
        `difference`: ours less theirs, the mean over tasks, in points. `low`, `high`: its 2.5 and
        97.5 % quantiles over resamples. `p`: share of resamples in which ours is not better.

    Raises:
        ValueError: no pair, no task, or other tasks or rows in one of a pair.
    """
    if not pairs:
        raise ValueError("there is no pair to compare")
    found = [_resampled(ours, theirs, n, seed) for ours, theirs in pairs]
    drawn = np.mean([one for _, one in found], axis=0)
    low, high = np.percentile(drawn, (2.5, 97.5))
    difference = sum(one for one, _ in found) / len(found)
    return {"difference": difference, "low": float(low), "high": float(high),
            "p": float((drawn <= 0).mean())}  # fmt: skip


def _resampled(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], n: int, seed: int
) -> tuple[float, np.ndarray]:
    """The difference of a pair, and of each resample: the same rows for every pair of a seed."""
    if not ours or ours.keys() != theirs.keys():
        raise ValueError("two methods are compared on the same tasks, on one at least")
    rng = np.random.default_rng(seed)
    difference, drawn = 0.0, np.zeros(n)
    for task in sorted(ours):
        a, b = (np.asarray(method[task], dtype=float) for method in (ours, theirs))
        if a.shape != b.shape:
            raise ValueError(f"{task}: stats of different rows, {a.shape} and {b.shape}")
        difference += task_score(task, a) - task_score(task, b)
        rows = rng.integers(len(a), size=(n, len(a)))
        drawn += _scores(task, a[rows]) - _scores(task, b[rows])
    return difference / len(ours), drawn / len(ours)
