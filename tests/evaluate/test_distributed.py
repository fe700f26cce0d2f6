"""How ranks share the pieces of a run, in one process; test_ranks.py starts several."""

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distributed import _round_end, launched_group
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.environment import local_ranks


def test_a_round_ends_before_its_adapters_are_too_large():
    """Adapters have 40 bytes each; an adapter that is in the round already costs nothing."""

    def adapter(value):
        return Adapter("", {"q": LoRA(mx.full((6, 1), value), mx.ones((1, 4)), 1.0)})

    row = ExampleSet("a", (Example((1, 2, 3), 1),))
    a, b, c = map(adapter, (1.0, 2.0, 3.0))
    pieces = [(one, row) for one in (a, None, a, b, a, c, c, b)]
    assert _round_end(pieces, 0, 2) == 8
    assert _round_end(pieces, 0, 2, most=80) == 5 and _round_end(pieces, 5, 2, most=80) == 8
    # One that is larger than a round may be is a round of its own.
    ends = [_round_end(pieces, start, 2, most=39) for start in range(8)]
    assert ends == [3, 3, 3, 4, 5, 7, 7, 8]


def test_alone_there_is_no_group(monkeypatch, tmp_path):
    assert launched_group() is None and local_ranks() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, expected in enumerate((2, 1, 2)):
        monkeypatch.setenv("MLX_RANK", str(rank))
        assert local_ranks() == expected
