"""Forecasts for `d2c-mlx run --dry-run`: the work of a run, and about how long it takes.

Work is counted in tokens that pass through the model, and time is that of as many tokens on this
machine, measured in a second or two. Linear algebra beside them is not counted.
"""

from collections.abc import Mapping
from typing import NamedTuple

from d2c_mlx.pipeline import STAGES
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.run import Run


class Forecast(NamedTuple):
    """The work of a run that is not done yet.

    Attributes:
        stages: stage -> tokens that pass through the model, in their order; None where it is done
            already, and will not be repeated.
        nbytes: most bytes of the pack.
        adapters: adapters of the pack, None where a plan chooses.
        tokens_per_second: measured on the base model, on this machine.
    """

    stages: Mapping[str, int | None]
    nbytes: int
    adapters: int | None
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """About how long the stages that are not done take."""
        tokens = sum(filter(None, self.stages.values()))
        return tokens / self.tokens_per_second if tokens else 0.0


def forecast(config: RunConfig, until: str = "report") -> Forecast:
    """Load and check all inputs, and estimate the run; nothing is written.

    Args:
        config: options of the run.
        until: name of the last stage.

    Raises:
        InputError: bad input, all problems at once.
    """
    run = Run(config, dry=True)
    library, capacity = run.inputs.library, run.inputs.capacity
    parts = [part for rows in library.calibration for part in rows.parts]
    rate = library.scorer.engine.tokens_per_second(parts)
    tokens = run.expected_tokens
    stages: dict[str, int | None] = {}
    for name in run.stages(until):
        library = STAGES[name](run, library)
        stages[name] = round(tokens.get(name, 0)) if name in run.left else None
    slots = None if run.planned else capacity.n_clusters
    # Merges of a higher rank than the adapters' may take more than all of them.
    largest = max(capacity.nbytes_of_rank(capacity.merge_rank), *capacity.sizes)
    nbytes = capacity.max_bytes or (slots or 0) * largest
    if capacity.max_bytes or slots == len(library.names):
        nbytes = min(nbytes, capacity.total)
    return Forecast(stages, nbytes, slots, rate)
