"""A line search over scales, the one search that tunes the strength of adapters."""

import math
from collections.abc import Callable, Sequence

# Scales of dW, in steps of about the fourth root of 2. Means of many near-orthogonal updates need
# more than 1, because a mean of T keeps about 1/T of each; sums need less.
SCALES = (
    0.125, 0.15, 0.175, 0.21, 0.25, 0.3, 0.35, 0.42, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0,
    2.4, 2.8, 3.4, 4.0, 4.8, 5.6, 6.7, 8.0, 9.5, 11.2, 13.4, 16.0,
)  # fmt: skip
# For merges. An evaluation covers all tasks of a merge, so steps are twice as long.
COARSE_SCALES = SCALES[::2]
# For an adapter in fewer components. A scale of 1 to 4 compensates for those that were dropped.
FINE_SCALES = tuple(scale for scale in SCALES if 0.7 <= scale <= 4)


def line_search(
    loss: Callable[[float], float], scales: Sequence[float], start: float | None = None
) -> tuple[float, float]:
    """Search downhill from the scale nearest to `start` until no neighbour is better.

    Each scale is evaluated once; ties go to the smaller one. A search from the first scale only
    moves up.

    Args:
        loss: gives the loss at a scale.
        scales: scales to try, increasing.
        start: scale to start near, by the logarithm; None starts in the middle of `scales`.

    Returns:
        The best scale found and its loss.
    """
    regrets: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in regrets:
            regrets[i] = loss(scales[i])
        return regrets[i]

    best = len(scales) // 2
    if start is not None:
        best = min(range(len(scales)), key=lambda i: abs(math.log(scales[i] / start)))
    while True:
        around = [i for i in (best - 1, best, best + 1) if 0 <= i < len(scales)]
        winner = min(around, key=lambda i: (at(i), i))
        if winner == best:
            return scales[best], at(best)
        best = winner
