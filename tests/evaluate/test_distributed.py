"""How ranks share the pieces of a run, in one process; test_ranks.py starts several."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import library
from hypothesis import given
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distributed import (
    _end,
    _next_speed,
    launched_group,
    share_out,
)
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.environment import local_ranks


def test_a_rank_that_has_cut_batches_already_cuts_as_the_one_with_the_least_memory(tmp_path):
    base = BaseModel(str(library(tmp_path, ["a"]).model))
    examples = ExampleSet("t", (Example(tuple(range(1, 31)), 20),) * 20)
    first, other = Engine(base), Engine(base)
    alone = first.batches(examples)
    for engine in (first, other):
        engine.follow(1_000_000, first.fold)
    assert len(alone) < len(first.batches(examples)) == len(other.batches(examples))
    assert first.fingerprint(examples) == other.fingerprint(examples)


def test_ranks_share_by_what_is_known_of_their_speed():
    nan = np.nan
    for work, expected in (
        ([3000, 0], [3000, 3000]),
        ([3000, 0, 1000], [3000, 2000, 1000]),
        ([3000, 10, 0], [3000, 300, 1505]),
    ):
        speed = _next_speed(np.full(len(work), nan), work, np.ones(len(work)))
        assert speed.tolist() == expected


@pytest.mark.parametrize("size", [350, 13000])
def test_a_rank_that_was_slow_once_is_tried_again(size):
    """Two ranks of one speed, of which the second has had a bad round."""
    tokens = [size] * max(2, 12288 // size)
    speed, rounds = np.array([3000.0, 10.0]), []
    for _ in range(80):
        work = [size * len(share) for share in share_out(tokens, speed)]
        # A rank without work has no speed that could be measured.
        speed = _next_speed(speed, work, [n / 3000 or 1e-5 for n in work])
        rounds.append(work)
    assert abs(rounds[-1][0] - rounds[-1][1]) <= size
    assert speed.tolist() == [3000, 3000]


def test_a_round_ends_before_its_adapters_are_too_large():
    """Adapters have 40 bytes each; an adapter that is in the round already costs nothing."""

    def adapter(value):
        return Adapter("", {"q": LoRA(mx.full((6, 1), value), mx.ones((1, 4)), 1.0)})

    row = ExampleSet("a", (Example((1, 2, 3), 1),))
    a, b, c = map(adapter, (1.0, 2.0, 3.0))
    pieces = [(one, row) for one in (a, None, a, b, a, c, c, b)]
    assert _end(pieces, 0, 2) == 8
    assert _end(pieces, 0, 2, most=80) == 5 and _end(pieces, 5, 2, most=80) == 8
    # One that is larger than a round may be is a round of its own.
    ends = [_end(pieces, start, 2, most=39) for start in range(8)]
    assert ends == [3, 2, 3, 4, 5, 7, 7, 8]


def test_alone_there_is_no_group(monkeypatch, tmp_path):
    assert launched_group() is None and local_ranks() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, expected in enumerate((2, 1, 2)):
        monkeypatch.setenv("MLX_RANK", str(rank))
        assert local_ranks() == expected


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    st.lists(st.floats(0.1, 100), min_size=1, max_size=5),
)
def test_every_piece_has_one_rank_and_faster_ranks_more(tokens, speed):
    cut = share_out(tokens, np.array(speed))
    assert sorted(i for mine in cut for i in mine) == list(range(len(tokens)))
    assert len(cut) == len(speed)
    for mine, part in zip(cut, np.array(speed) / sum(speed)):
        # A piece goes to one rank as a whole: a share is off by less than its two border pieces.
        assert abs(sum(tokens[i] for i in mine) - part * sum(tokens)) <= max(tokens) + 1e-6
