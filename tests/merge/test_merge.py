"""Options of a merge, and the lists of methods in documents and config."""

import re

import numpy as np
import pytest
from helpers import ROOT
from helpers.loras import (
    P,
    Q,
    R,
    adapters_of,
    inputs_of,
    lora_of,
    merge_by,
)
from helpers.methods import PROMISES

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.utils.errors import AdapterError, ConfigError


def test_options_that_are_wrong_are_named():
    adapters = adapters_of(np.random.default_rng(0), 3, {P: (9, 7), Q: (5, 6)})
    wrong = {
        "density: found 0.0": {"density": 0.0},
        "rank: found 0": {"rank": 0},
        "weights: 'ties' takes none": {"method": "ties", "weights": [1, 1, 1]},
        "weights: found": {"weights": [1.0, float("nan"), 1.0]},
        "activations: 'linear' takes none": {"activations": {}},
        "activations: 'regmean' needs 3 arrays.*2 lack them": {"method": "regmean"},
    }
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=message):
            merge_adapters(adapters, **options)
    with pytest.raises(ConfigError) as error:
        merge_adapters([], density=2.0, rank=-1)
    assert len(error.value.problems) == 3
    inputs = inputs_of(adapters)
    inputs[P][1] = np.zeros((4, 8))
    with pytest.raises(ConfigError, match="activations: model.layers.0.q.*expected .n_tokens, 9."):
        merge_adapters(adapters, "regmean", activations=inputs)


def test_adapters_of_different_bases_are_refused():
    rng = np.random.default_rng(0)
    adapters = [Adapter(str(i), {P: lora_of(rng, (4 + i, 5), 1)}) for i in range(2)]
    with pytest.raises(AdapterError, match="model.layers.0.q: .*different base models.*4, 5.*5, 5"):
        merge_adapters(adapters)


def test_the_table_of_the_documents_is_true():
    """merge-methods.md: one row per method, each of which runs on whatever is put together."""
    text = (ROOT / "docs" / "reference" / "merge-methods.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    of_runs, rows = rows[:2], rows[2:]
    assert [row[0] for row in of_runs] == ["`layerwise`", "`regmean++`"]
    assert all("of a run only" in row[1] for row in of_runs)
    assert [row[0].strip("`") for row in rows] == list(PROMISES)
    adapters = adapters_of(np.random.default_rng(1), 5, {P: (9, 7), Q: (5, 6), R: (4, 4)})
    assert len({lora.rank for one in adapters for lora in one.modules.values()}) > 2
    assert len({tuple(one.modules) for one in adapters}) > 1
    for name, *cells in rows:
        assert len(cells) == 1 and all(cells)
        merged = merge_by(adapters, name.strip("`"))
        assert set(merged.modules) == {P, Q, R}
        assert merge_by(adapters[:1], name.strip("`")).digest == adapters[0].digest
    named = set(re.findall(r"`([a-z_-]+)=", text))
    assert named <= {"seed", "weights", "density", "rank", "activations"}


def test_unknown_method():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (3, 3), 1)})
    for adapters in ([one], [one, one]):
        with pytest.raises(ConfigError, match="merge_method: found 'dare', .* of linear, ties"):
            merge_adapters(adapters, "dare")
