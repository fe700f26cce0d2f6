"""The paper's experiment: every method within its bytes, against oracles, and a whole run."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.loras import adapters_of, dense
from helpers.tiny import SHAPES, library, peft_adapter

from benchmarks import RESULTS
from benchmarks.quality import experiment
from benchmarks.quality.methods import METHODS, by_arrival, merged, slots_of
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow

NAMES = ["date-en", "gec-en", "num-de", "qa-de", "reply-fr", "summ-en"]


@pytest.fixture
def paths(tmp_path):
    found = library(tmp_path, NAMES)
    # As in a real library, one is larger than the others.
    peft_adapter(found.adapters, "gec-en", rank=8, seed=9, targets=tuple(SHAPES))
    return found


@pytest.fixture
def session(paths, tmp_path):
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        output=str(tmp_path / "run"), budget="90%", probe_examples=2, test_examples=2,
    )  # fmt: skip
    return run(config, until="probe", quiet=True)


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if how])
def test_a_method_stores_no_more_than_its_budget(session, method):
    nbytes = int(0.5 * session.capacity.total)
    assert slots_of(session, nbytes)[0] == 3
    k, rank = slots_of(session, nbytes, 1 if method == "merge-all" else None)
    stored = merged(session, *METHODS[method], nbytes, 0)
    assert stored.nbytes <= nbytes and set(stored.serves) == set(NAMES)
    assert stored.n_adapters == k
    assert max(one.rank for one in stored.serves.values()) <= rank
    together = [name for names in stored.about["clusters"] for name in names]
    assert sorted(together) == NAMES
    for names in stored.about["clusters"]:
        assert len({stored.serves[name].digest for name in names}) == 1


def flat_updates(adapters):
    """`(n, numbers)` of every dW, modules that are missing as zeros."""
    shapes = {path: lora.shape for one in adapters for path, lora in one.modules.items()}
    return np.array([
        np.concatenate([
            dense(one.modules[path]).ravel() if path in one.modules else np.zeros(np.prod(shape))
            for path, shape in sorted(shapes.items())
        ])
        for one in adapters
    ])  # fmt: skip


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("seed", range(5))
def test_adapters_that_arrive_join_the_slot_that_is_most_alike(seed):
    rng = np.random.default_rng(seed)
    adapters = adapters_of(rng, 7, {"a": (6, 5), "b": (4, 6)})
    rows, slots = flat_updates(adapters), []
    for i in np.random.default_rng(seed).permutation(7):
        if len(slots) < 3:
            slots.append([i])
        else:
            means = [rows[slot].mean(axis=0) for slot in slots]
            slots[int(np.argmax([cosine(rows[i], mean) for mean in means]))].append(i)
    found = by_arrival(None, adapters, 3, seed).groups
    assert sorted(map(sorted, found)) == sorted(sorted(map(int, slot)) for slot in slots)


def test_a_whole_run_resumes_and_says_what_was_measured(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("D2C_MLX_CACHE", raising=False)
    # As rows.py leaves them: a manifest beside the tasks, and tasks that have no adapter.
    (paths.tasks / "manifest.json").write_text("{}")
    (paths.tasks / "date-sv").mkdir()
    result, kept = tmp_path / "experiment.json", tmp_path / "kept"
    command = ["experiment.py", "--library", tmp_path, "--work", tmp_path / "work", "--rows",
               kept, "--budgets", "60", "--seeds", "0,1", "--examples", 2, "--tests", 2,
               "--draws", 2, "--model", paths.model, "--output", result]  # fmt: skip

    def call(methods):
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--methods", methods])
        experiment.main()
        rows = json.loads(result.read_text())["rows"]
        return {(row["method"], row.get("seed"), row.get("draw")): row for row in rows}

    first = call("random;auto")
    assert set(first) == {("base", None, None), ("individual", None, None)} | {
        (method, seed, draw)
        for method, draw in (("random", 0), ("random", 1), ("auto", 0))
        for seed in (0, 1)
    }
    for (method, *_), row in first.items():
        assert set(row["tasks"]) == set(NAMES)
        if method not in ("base", "individual"):
            assert 0 < row["share"] <= 0.6
            assert row["against_individual"]["low"] <= row["against_individual"]["high"]
        assert ("auto_against_it" in row) == (method == "random")
    capsys.readouterr()
    second = call("random;auto;K-Means;D2C, mean;rank alone")
    assert {key: second[key]["seconds"] for key in first} == {
        key: row["seconds"] for key, row in first.items()
    }
    more = ("K-Means", "D2C, mean", "rank alone")
    assert set(second) - set(first) == {(method, seed, 0) for method in more for seed in (0, 1)}
    alone = second["rank alone", 0, 0]
    assert 0 < alone["share"] <= 0.6 and "follows" not in alone
    pairs = {(one["method"], one["beside"]): one for one in json.loads(result.read_text())["pairs"]}
    assert set(pairs) == {
        ("auto", "individual"), ("D2C, mean", "K-Means"), ("D2C, mean", "random"),
    }  # fmt: skip
    scores = {
        key: np.mean([score for _, score in row["tasks"].values()]) for key, row in second.items()
    }
    for pair, draws in ((("D2C, mean", "K-Means"), (0,)), (("D2C, mean", "random"), (0, 1))):
        gaps = [
            scores[pair[0], seed, 0] - scores[pair[1], seed, draw]
            for seed in (0, 1) for draw in draws
        ]  # fmt: skip
        assert pairs[pair]["difference"] == pytest.approx(np.mean(gaps), abs=1e-3)
        assert pairs[pair]["seeds"] == [0, 1]
    assert "random" not in capsys.readouterr().out
    # Rows outlive the work directory, one line each.
    shutil.rmtree(tmp_path / "work")
    lines = {file: file.read_text() for file in kept.iterdir()}
    assert all(text.count("\n") == 1 for file, text in lines.items() if file.stem != "settings")
    assert call("random;auto;K-Means;D2C, mean;rank alone") == second
    assert lines == {file: file.read_text() for file in kept.iterdir()}
    # What is kept is of these adapters and test rows.
    weights = paths.adapters / NAMES[0] / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(SystemExit, match=r"settings\.json: found .*'adapters'"):
        call("auto")
    weights.write_bytes(before)
    command[command.index("--tests") + 1] = 3
    with pytest.raises(
        SystemExit, match=r"settings\.json: found .*'tests': 2.*expected .*'tests': 3"
    ):
        call("auto")


def flat(value, path=()):
    """Path -> every word and number of JSON."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: one for key, part in parts for at, one in flat(part, (*path, key)).items()}


def test_what_is_published_is_what_its_rows_say():
    published = json.loads((RESULTS / "experiment_24.json").read_text())
    options = SimpleNamespace(rows=RESULTS / "rows_24", **published["settings"])
    found, expected = map(flat, (experiment.summary(options), published))
    assert set(found) == set(expected)
    # Sums differ in their last digits between machines, and with them what ties are counted as.
    for path, value in expected.items():
        near = 2e-3 if path[-1] == "p" else 1e-6
        assert found[path] == pytest.approx(value, abs=near), path
