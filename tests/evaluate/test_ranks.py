"""Several ranks on loopback with the ring backend give the bytes that one process gives."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from helpers.processes import MAIN, launch
from helpers.tiny import library
from hypothesis import given
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.batches import PassSize
from d2c_mlx.evaluate.distributed import (
    _end,
    _follow,
    _measured,
    _weights,
    launched_group,
    local_ranks,
    share_out,
)
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.messages import (
    RankError,
    _join_lengths,
    _split_lengths,
    gather,
    pack_pieces,
    send,
    unpack_pieces,
)
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.run.doctor import Tuning, _key
from d2c_mlx.utils.blas import loaded_blas
from d2c_mlx.utils.files import hash_tree, write_json

pytestmark = pytest.mark.slow


def options(paths, output, **more):
    values = {"model": paths.model, "adapters": paths.adapters, "tasks": paths.tasks}
    values |= {"output": output, "budget": "50%", "plan": "d2c", "random-seeds": 1, "answers": 0}
    values |= more
    return ["run", "--quiet", *(f"--{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("ranks"), ["a", "b", "c"])


def tuned_cache(path, model):
    """A cold cache, but for a tuning: every row makes a pass alone."""
    tuning = Tuning("tiny", PassSize(most=1), 1.0, 1.0, None)
    write_json(path / "tunings.json", {_key(BaseModel(str(model))): asdict(tuning)})
    return path


@pytest.fixture(scope="module")
def alone(paths, tmp_path_factory):
    """The run of one process, with its own cold cache, tuned."""
    root = tmp_path_factory.mktemp("alone")
    tuned_cache(root / "cache", paths.model)
    command = [sys.executable, "-c", MAIN, *options(paths, root / "run")]
    environment = {**os.environ, "D2C_MLX_CACHE": str(root / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return root / "run"


@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(n, paths, alone, tmp_path):
    """Workers get a useless command line, as on a Mac without these files; rank 0 is tuned."""
    cache = tuned_cache(tmp_path / "cache", paths.model)
    program = (
        "import os, sys\n"
        "if os.environ['MLX_RANK'] != '0': sys.argv[1:] = ['run', '--adapters', 'nowhere']\n" + MAIN
    )
    done = launch(n, options(paths, tmp_path / "run"), cache, program, port=10 * n)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    assert done.stdout.count("| pack |") == 1  # workers print nothing
    for name in ("pack", "losses.json", "clusters.json", "merges.json"):
        assert hash_tree(tmp_path / "run" / name) == hash_tree(alone / name)


def test_a_planned_pack_has_the_same_bytes(paths, tmp_path):
    """What the own adapters expect is sent to workers too."""
    one, two = (
        options(paths, tmp_path / n / "run", plan="auto", budget="60%", answers=1)
        for n in ("one", "two")
    )
    command = [sys.executable, "-c", MAIN, *one]
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "one" / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    done = launch(2, two, tmp_path / "two" / "cache", port=40)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    for name in ("pack", "plan.json"):
        found = {hash_tree(tmp_path / n / "run" / name) for n in ("one", "two")}
        assert len(found) == 1


def test_bad_input_ends_all_ranks(paths, tmp_path):
    arguments = options(paths, tmp_path / "run", tasks=tmp_path / "missing")
    done = launch(2, arguments, tmp_path / "cache", port=60)
    assert "rank 0 exited with code 2" in done.stderr  # mlx.launch itself always returns 0
    assert "no such directory" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_worker_with_another_model_is_named(paths, tmp_path):
    program = (
        "import os, d2c_mlx, d2c_mlx.models.base_model as m\n"
        "if os.environ['MLX_RANK'] == '1': m._ENGINE = 'other'\n" + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=70)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    assert "error: rank 1: " in text and "is not the base model that rank 0 has" in text
    assert not (tmp_path / "run").exists()


def test_a_rank_that_computes_otherwise_is_named(paths, tmp_path):
    """Another version of MLX and, where there is one, no fast BLAS."""
    program = (
        "import os, importlib.metadata as m\n"
        "if os.environ['MLX_RANK'] == '1':\n"
        "    os.environ['D2C_MLX_BLAS'], version = 'off', m.version\n"
        "    m.version = lambda name: '0.1' if name == 'mlx' else version(name)\n" + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=90)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert (
        line.startswith("error: rank 1: MLX: found 0.1, rank 0 has ") and "make them equal" in line
    )
    assert ("BLAS: found None, rank 0 has /" in line) == (loaded_blas() is not None)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_ends_the_run_with_a_line(paths, tmp_path):
    """The ring backend returns what was in memory then, and waits for ever after that."""
    program = (
        "import os, d2c_mlx, d2c_mlx.evaluate.distributed as r\n"
        "if os.environ['MLX_RANK'] == '1': r._evaluate = lambda *_: os.kill(os.getpid(), 9)\n"
        + MAIN
    )
    done = launch(2, options(paths, tmp_path / "run"), tmp_path / "cache", program, port=100)
    text = done.stdout + done.stderr
    assert "rank 0 exited with code 1 " in text and "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "the same command continues" in line and "| pack |" not in text


@pytest.mark.parametrize("name", ["all_sum", "all_gather"])
def test_a_lost_connection_is_told_as_a_rank_that_has_ended(monkeypatch, name):
    """As the ring backend says it where it notices before `mlx.launch` ends the others."""
    group = mx.distributed.init()

    def lost(x, group):
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx.distributed, name, lost)
    with pytest.raises(RankError, match="a rank has ended.*lost.*the same command continues"):
        send(group, {"n": 1}) if name == "all_sum" else gather(group, {"row": []}, 1)


def test_what_was_in_memory_before_is_no_answer(monkeypatch):
    """As the ring backend gives it for a rank that has ended: nothing, or an earlier answer."""
    group, stored = mx.distributed.init(), []
    assert gather(group, {"row": [0.1]}, 3) == [{"row": [0.1]}]
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: stored.append(x) or x)
    gather(group, {"row": [0.1]}, 4)
    for left in (stored[0], mx.zeros_like(stored[0]), 255 * mx.ones_like(stored[0])):
        monkeypatch.setattr(
            mx.distributed, "all_gather", lambda x, group, left=left: mx.concatenate([x, left])
        )
        with pytest.raises(RankError, match="^no answer of rank 1: a rank has ended"):
            gather(group, {"row": [0.1]}, 5)


SHARED = """
import sys
import d2c_mlx, d2c_mlx.evaluate.distributed as r
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.run.doctor import Tuning, _key
from d2c_mlx.models.base_model import BaseModel
cuts, shares = [], r.share_out
r.share_out = lambda *given: cuts.append(shares(*given)) or cuts[-1]
row = Example(tuple(range(1, 31)), 20)
def pieces(n, n_rows):
    return [(None, ExampleSet(f"{n_rows}-{i}", (row,) * n_rows)) for i in range(n)]
group = r.launched_group()
if group.rank():
    r.run_worker(group)
else:
    with r.leading_rank():
        engine = Engine(BaseModel(sys.argv[1]))
        for calls in ([pieces(1, 2), pieces(6, 2)], [pieces(4, 450)]):
            ranks = r.Ranks(engine, group)
            for some in calls:
                assert dict(ranks.run(some)) == dict(engine.run(some))
    print("cuts", cuts)
"""


def test_no_rank_is_idle_for_the_rest_of_a_run(paths, tmp_path):
    """After a call with work for one rank only, and with sets that fill a round alone."""
    done = launch(2, [paths.model], tmp_path / "cache", SHARED, port=80)
    assert "exited with code" not in done.stderr, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "cuts" in line)
    cuts = json.loads(line.split("cuts")[1])
    assert cuts[:2] == [[[0], []], [[0, 1, 2], [3, 4, 5]]]
    # Pieces of 13,500 tokens: one for each, then as fast as they are.
    assert cuts[2] == [[0], [1]] and len(cuts) == 4


def test_a_rank_that_has_cut_batches_already_cuts_as_the_one_with_the_least_memory(paths):
    base = BaseModel(str(paths.model))
    examples = ExampleSet("t", (Example(tuple(range(1, 31)), 20),) * 20)
    first, other = Engine(base), Engine(base)
    alone = first.batches(examples)
    for engine in (first, other):
        _follow(engine, [1_000_000, first.fold])
    assert len(alone) < len(first.batches(examples)) == len(other.batches(examples))
    assert first.fingerprint(examples) == other.fingerprint(examples)


def test_ranks_share_by_what_is_known_of_their_speed():
    nan = np.nan
    for speed, expected in (
        ([nan, nan], [1, 1]),
        ([3000, nan], [3000, 3000]),
        ([3000, nan, 1000], [3000, 2000, 1000]),
        ([3000, 10, nan], [3000, 300, 1505]),
    ):
        assert _weights(np.array(speed)).tolist() == expected


@pytest.mark.parametrize("size", [350, 13000])
def test_a_rank_that_was_slow_once_is_tried_again(size):
    """Two ranks of one speed, of which the second has had a bad round."""
    tokens = [size] * max(2, 12288 // size)
    speed, rounds = np.array([3000.0, 10.0]), []
    for _ in range(80):
        work = [size * len(mine) for mine in share_out(tokens, _weights(speed))]
        # What is measured of nothing is no speed.
        speed = _measured(speed, work, [n / 3000 or 1e-5 for n in work])
        rounds.append(work)
    assert abs(rounds[-1][0] - rounds[-1][1]) <= size
    assert speed.tolist() == [3000, 3000]


def test_a_message_may_have_more_than_four_gigabytes():
    group = mx.distributed.init()
    sent = mx.array(_split_lengths(7, 5_000_000_000))
    assert _join_lengths(np.array(mx.distributed.all_sum(sent, group=group))) == [7, 5_000_000_000]


def test_a_round_ends_before_its_adapters_are_too_large():
    """Of 40 bytes each; one that is in the round already costs nothing."""

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


def test_ranks_that_never_had_work_stay_unknown():
    speed = _measured(np.full(3, np.nan), [0, 600, 0], [0.0, 0.2, 0.0])
    assert np.isnan(speed[[0, 2]]).all() and speed[1] == pytest.approx(3000)


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


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_pieces_arrive_as_they_left(dtype):
    mx.random.seed(0)
    loras = {
        f"model.layers.{i}.q_proj": LoRA(
            mx.random.normal((6, i + 1)).astype(dtype), mx.random.normal((i + 1, 4)).astype(dtype),
            0.3 + i,
        )
        for i in range(3)
    }  # fmt: skip
    sets = [ExampleSet(name, (Example((1, 2, 3), 1), Example((4, 5), 0))) for name in "ab"]
    said = np.arange(15, dtype=np.float32).reshape(3, 5) / 7
    sets[1] = ExampleSet(
        "b", (Example((7, 8), 1), Example((7, 8, 9), 1)), (), "t", (said[:1], said[1:])
    )
    pieces = [(None, sets[0]), (Adapter("x", loras), sets[1]), (Adapter("y", loras), sets[0])]
    header, floats = pack_pieces(pieces, [[0], [1, 2]])
    assert len(header["adapters"]) == 1  # equal content travels once
    back = unpack_pieces(header, floats)
    assert [one for _, one in back] == [sets[0], sets[1], sets[0]]
    assert [x.tolist() for x in back[1][1].teacher_targets] == [
        said[:1].tolist(),
        said[1:].tolist(),
    ]
    assert back[0][0] is None and back[1][0] is back[2][0]
    for path, lora in back[1][0].modules.items():
        for got, sent in ((lora.a, loras[path].a), (lora.b, loras[path].b)):
            assert mx.array_equal(got, sent.astype(mx.float32))
        assert lora.scale == loras[path].scale
