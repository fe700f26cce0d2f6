"""quality/metrics.py: every metric by hand, and intervals against scipy."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from benchmarks.quality import metrics


def score(task, *pairs):
    """Of (expected, answer)."""
    stats = [metrics.row_stats(task, "Do this: it", *pair) for pair in pairs]
    return metrics.task_score(task, np.array(stats))


@pytest.mark.parametrize("source, target, edits", [
    ("Dei Größe wird angepasst.", "Die Größe wird angepasst.", [(0, 1, ("Die",))]),
    ("Tipo archivo", "Tipo de archivo", [(1, 1, ("de",))]),
    ("in in the house", "in the house", [(1, 2, ())]),
    # Two errors side by side are two edits; a word split or joined is one.
    ("e stato compeltato", "È stata compeltato", [(0, 1, ("È",)), (1, 2, ("stata",))]),
    ("the sub-way here", "the subway here", [(1, 4, ("subway",))]),
    # A misspelt word beside one that is missing.
    ("need configgure now", "need to configure now", [(1, 1, ("to",)), (1, 2, ("configure",))]),
    ("look at it", "watch it", [(0, 2, ("watch",))]),
])  # fmt: skip
def test_edits_by_hand(source, target, edits):
    assert metrics.source_edits(source, target) == edits


def test_gec_by_hand():
    source, expected = "Dei Katze hat ein Maus", "Die Katze hat eine Maus"

    def gec(answer):
        return metrics.row_stats("gec-xx", f"Correct the errors: {source}", expected, answer)

    assert gec(expected) == (2, 0, 0) and gec(source) == (0, 0, 2)
    # Another correction of the same place is wrong, and the right one missing.
    assert gec("Die Katze hat einen Maus .") == (1, 2, 1)
    # P = 3/4, R = 3/5: 1.25 x 0.45 / (0.25 x 0.75 + 0.6) = 5/7, not a mean over rows.
    assert metrics.task_score("gec-de", np.array([[1, 0, 2], [2, 1, 0]])) == pytest.approx(500 / 7)
    for row, value in (((0, 0, 0), 100), ((0, 0, 1), 0), ((0, 1, 0), 0)):
        assert metrics.task_score("gec-de", np.array([row])) == value


@pytest.mark.parametrize("task, expected, answer, value", [
    ("qa-pl", "peso dominikańskie", "Peso dominikanskie.", 50),
    ("qa-en", "United Arab Emirates Dirham", "Dirham", 40),
    ("num-fr", "huit cent trente-neuf", " Huit cent  trente-neuf\n", 100),
    ("num-fr", "huit cent trente-neuf", "huit cent trente neuf", 0),
    # Longest common subsequence 2 of 3 and 4 words: P = 2/4, R = 2/3.
    ("summ-de", "Wörterbuch für Übersetzer", "Wörterbuch der Übersetzer Europas", 400 / 7),
    ("tone-fr", "Votre mère était là.", "votre mère ETAIT là", 75),
    ("summ-en", "!", "?", 100), ("summ-en", "word", "?", 0),
])  # fmt: skip
def test_other_metrics_by_hand(task, expected, answer, value):
    assert score(task, (expected, answer)) == pytest.approx(value)
    assert score(task, (expected, answer), (expected, expected)) == pytest.approx(50 + value / 2)


def some_tasks(seed, n_rows=40):
    """Two methods; the first has more right."""
    rng = np.random.default_rng(seed)
    ours, theirs = {}, {}
    for name in ("gec-0", "qa-1", "num-2", "reply-3"):
        size = (n_rows, 3 if name.startswith("gec") else 1)
        theirs[name] = rng.integers(0, 2, size).astype(float)
        ours[name] = np.where(rng.random(size) < 0.2, 1.0, theirs[name])
    return ours, theirs


@pytest.mark.parametrize("task", ["gec-0", "qa-1"])
def test_bootstrap_of_one_task_is_scipys(task):
    a, b = (method[task] for method in some_tasks(0))
    result = metrics.paired_bootstrap({task: a}, {task: b}, n=4000)

    def difference(rows):
        rows = rows.astype(int)
        return metrics.task_score(task, a[rows]) - metrics.task_score(task, b[rows])

    theirs = bootstrap((np.arange(len(a)),), difference, vectorized=False, n_resamples=4000,
                       method="percentile", rng=np.random.default_rng(1))  # fmt: skip
    interval, spread = theirs.confidence_interval, theirs.standard_error
    assert result["difference"] == pytest.approx(difference(np.arange(len(a))))
    assert result["low"] == pytest.approx(interval.low, abs=0.2 * spread)
    assert result["high"] == pytest.approx(interval.high, abs=0.2 * spread)
    assert result["p"] == pytest.approx((theirs.bootstrap_distribution <= 0).mean(), abs=0.03)


def test_draws_are_pooled_over_the_same_rows():
    (ours, theirs), (other, _) = some_tasks(3, 20), some_tasks(4, 20)
    pooled = metrics.pooled_bootstrap([(ours, theirs), (other, theirs)])
    each = [metrics.paired_bootstrap(method, theirs)["difference"] for method in (ours, other)]
    assert pooled["difference"] == pytest.approx(sum(each) / 2)
    # The score of F1, a mean over rows, is linear: the mean of both is a method of its own.
    a, b, beside = ({"qa-1": method["qa-1"]} for method in (ours, other, theirs))
    alike = metrics.pooled_bootstrap([(a, beside), (b, beside)])
    alone = metrics.paired_bootstrap({"qa-1": (a["qa-1"] + b["qa-1"]) / 2}, beside)
    # Not `p`: a tie is one but for rounding.
    for key in ("difference", "low", "high"):
        assert alike[key] == pytest.approx(alone[key])
