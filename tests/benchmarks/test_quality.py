"""benchmarks/quality: every method within its bytes, cases against whole runs, published numbers.

Of numbers that are published: beside dense oracles, and as their rows say.
"""

import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import adapters_of, dense, lora_of
from helpers.tiny import SHAPES, library, peft_adapter, task

from benchmarks import RESULTS
from benchmarks.formats.loraquant import LoraQuant, important
from benchmarks.new_task.compose import arithmetic_weights
from benchmarks.quality import ablations, experiment, slots
from benchmarks.quality.methods import METHODS, by_arrival, merged, slots_of
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow

NAMES = ["date-en", "gec-en", "num-de", "qa-de", "reply-fr", "summ-en"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    paths = library(tmp_path_factory.mktemp("quality"), NAMES)
    for name in NAMES:
        task(paths.tasks, name, n_probe=10)
    # As in a real library, one is larger than the others.
    peft_adapter(paths.adapters, "gec-en", rank=8, seed=9, targets=tuple(SHAPES))
    # As rows.py leaves them: a manifest beside the tasks, and tasks that have no adapter.
    (paths.tasks / "manifest.json").write_text("{}")
    (paths.tasks / "date-sv").mkdir()
    return paths


@pytest.fixture(scope="module")
def options(paths):
    """Options of a short run on the tiny library."""
    places = {name: str(path) for name, path in paths._asdict().items()}
    return {**places, "probe_examples": 2, "test_examples": 2, "baselines": ()}


@pytest.fixture(scope="module")
def session(options, tmp_path_factory):
    """A run up to its losses."""
    output = str(tmp_path_factory.mktemp("run") / "run")
    return run(RunConfig(**options, output=output, budget="90%"), until="probe", quiet=True)


@pytest.fixture
def script(paths, tmp_path, monkeypatch):
    """Call `main` of a script on the library: the rows of its result."""
    monkeypatch.delenv("D2C_MLX_CACHE", raising=False)

    def call(module, **options):
        result = tmp_path / "result.json"
        words = {"library": paths.tasks.parent, "work": tmp_path / "work", "tests": 2,
                 "model": paths.model, "output": result} | options  # fmt: skip
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in words.items()]
        monkeypatch.setattr(sys, "argv", ["script", *(word for pair in pairs for word in pair)])
        module.main()
        return json.loads(result.read_text())["rows"]

    return call


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if how])
def test_a_method_stores_no_more_than_its_budget(session, method):
    nbytes = int(0.5 * session.capacity.total)
    k, rank = slots_of(session, nbytes, 1 if method == "merge-all" else None)
    stored = merged(session, *METHODS[method], nbytes, 0)
    assert stored.nbytes <= nbytes and stored.n_adapters == k == (1 if method == "merge-all" else 3)
    assert max(adapter.rank for adapter in stored.serves.values()) <= rank
    assert sorted(name for names in stored.about["clusters"] for name in names) == NAMES


def test_adapters_that_arrive_join_the_slot_that_is_most_alike():
    adapters = adapters_of(np.random.default_rng(3), 7, {"a": (6, 5), "b": (4, 6)})
    rows = np.array([np.concatenate([dense(adapter.modules[path]).ravel() if path in adapter.modules
                                     else np.zeros(30 if path == "a" else 24) for path in "ab"])
                     for adapter in adapters])  # fmt: skip

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for seed in range(5):
        groups = []
        for i in np.random.default_rng(seed).permutation(7):
            if len(groups) < 3:
                groups.append([i])
            else:
                means = [rows[group].mean(axis=0) for group in groups]
                groups[int(np.argmax([cosine(rows[i], mean) for mean in means]))].append(i)
        result = by_arrival(None, adapters, 3, seed).groups
        assert sorted(map(sorted, result)) == sorted(sorted(map(int, group)) for group in groups)


def test_an_experiment_resumes_and_says_what_was_measured(script, tmp_path):
    settings = {"rows": tmp_path / "kept", "budgets": 60, "seeds": "0,1", "examples": 2, "draws": 2}
    methods = "random;D2C, mean"
    rows = script(experiment, methods=methods, **settings)
    named = {(row["method"], row.get("seed"), row.get("draw")): row for row in rows}
    measured = [("random", 0), ("random", 1), ("D2C, mean", 0)]
    assert named.keys() == {("base", None, None), ("individual", None, None)} | {
        (method, seed, draw) for method, draw in measured for seed in (0, 1)
    }
    for (method, *_), row in named.items():
        assert set(row["tasks"]) == set(NAMES)
        if method not in ("base", "individual"):
            assert 0 < row["share"] <= 0.6
            assert row["against_individual"]["low"] <= row["against_individual"]["high"]
    (pair,) = json.loads((tmp_path / "result.json").read_text())["pairs"]
    assert (pair["method"], pair["beside"], pair["seeds"]) == ("D2C, mean", "random", [0, 1])
    scores = {key: np.mean([score for _, score in row["tasks"].values()])
              for key, row in named.items()}  # fmt: skip
    gaps = [scores["D2C, mean", seed, 0] - scores["random", seed, draw]
            for seed in (0, 1) for draw in (0, 1)]  # fmt: skip
    assert pair["difference"] == pytest.approx(np.mean(gaps), abs=1e-3)
    # Measured once; what is kept is of these settings.
    assert script(experiment, methods=methods, **settings) == rows
    with pytest.raises(SystemExit, match=r"settings\.json: found .*'tests': 2.*'tests': 3"):
        script(experiment, methods="random", **settings | {"tests": 3})


def test_slots_are_runs_and_merges_are_of_the_same_clusters(script, paths, options, tmp_path):
    rows = {row["case"]: row for row in script(
        slots, cases="individual;estimates;estimates: linear;random", clusters=2, seeds=0,
        examples=2, random_seeds=3)}  # fmt: skip
    assert rows["individual"]["excess"] == 0 and rows["individual"]["retention"] == 1
    whole = run(RunConfig(**options, budget="2", output=str(tmp_path / "run")), quiet=True)
    pack = whole.read("bench.json")["methods"]["pack"]
    assert rows["estimates"]["excess"] == pytest.approx(pack["excess"], abs=1e-6)

    (clusters,), (merges,) = (rows["estimates: linear"][key] for key in ("clusters_of", "merges"))
    assert [clusters] == rows["estimates"]["clusters_of"]
    base = Model(str(paths.model))
    scorer, total = Scorer(Engine(base)), 0
    for names, (method, scale) in zip(clusters, merges):
        own = [read_adapter(paths.adapters / name, base.module_shapes) for name in names]
        tests = [base.encode(name, load_task(paths.tasks / name).test[:2]) for name in names]
        merge = scaled(merge_adapters(own), scale) if method == "linear" else own[0]
        (losses,) = scorer.losses([(merge.uniform(base.dtype), tests)])
        total += sum(losses)
        total -= sum(scorer.losses([(adapter, [test])])[0][0] for adapter, test in zip(own, tests))
    assert rows["estimates: linear"]["excess"] == pytest.approx(total / len(NAMES), abs=1e-4)
    draws = rows["random"]
    assert len(draws["each_excess"]) == 3 == len(draws["clusters_of"])
    assert draws["excess"] == pytest.approx(sum(draws["each_excess"]) / 3)


def flat(value, path=()):
    """Path -> every word and number of JSON."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: leaf for key, part in parts for at, leaf in flat(part, (*path, key)).items()}


@pytest.mark.parametrize("module", [experiment, ablations])
def test_what_is_published_is_what_its_rows_say(module):
    name = "ablations" if module is ablations else "experiment_24"
    published = json.loads((RESULTS / f"{name}.json").read_text())
    given = {"budget": 12.5} if module is ablations else published["settings"]
    summary = module.summary(SimpleNamespace(rows=RESULTS / "rows_24", **given))
    result, expected = map(flat, (summary, published))
    assert set(result) == set(expected)
    # Sums differ in their last digits between machines, and with them what ties are counted as.
    for path, value in expected.items():
        near = 2e-3 if path[-1] == "p" else 1e-6
        assert result[path] == pytest.approx(value, abs=near), path


def test_arithmetic_finds_the_missing_sum_of_a_kind_and_a_language():
    rng = np.random.default_rng(0)
    kinds, languages = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    updates = {f"k{i}-l{j}": kinds[i] + languages[j] for i in range(3) for j in range(4)}
    missing = updates.pop("k1-l2")
    weights = arithmetic_weights(list(updates), "k1-l2")
    np.testing.assert_allclose(weights @ np.stack(list(updates.values())), missing)


def test_loraquant_as_a_peer(tmp_path):
    """Bytes are those of codes, scales, zero points and a compact header; the important part of the
    components holds its share."""
    rng = np.random.default_rng(0)
    shapes = {"q": (192, 160), "v": (192, 64)}
    loras = {path: lora_of(rng, s, 4, 1.0, mx.float32, 0.3) for path, s in shapes.items()}
    adapter = Adapter("x", loras)
    quant = LoraQuant([adapter], 2, rest=True)
    write_compact(tmp_path / "x", [compress(adapter, dict.fromkeys(loras, [(4, 2)]))])
    header = 8 + int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    # Four components; 192 and 160 numbers are two groups of 128, 64 are one. Two modules' counts.
    rows = 4 * sum(w / 4 + g * 2.25 for w, g in ((192, 2), (160, 2), (192, 2), (64, 1)))
    assert quant.nbytes(1.0) == header + 2 + rows
    share = quant.fit(most := quant.nbytes(0.5))
    assert quant.nbytes(share) <= most < quant.nbytes(share + 1e-3)
    assert LoraQuant([adapter], 2, rest=False).fit(10) == 0
    exact = {path: lora.delta() for path, lora in loras.items()}
    for path, matrix in exact.items():
        energy = np.linalg.svd(matrix, compute_uv=False)[:4] ** 2
        n = important(quant._parts["x"][path], 0.7)
        assert energy[: n - 1].sum() < 0.7 * energy.sum() <= energy[:n].sum() * (1 + 1e-5)

    def error(bits, rest, share):
        stored = LoraQuant([adapter], bits, rest).adapter("x", share)
        return sum(np.linalg.norm(stored.modules[p].delta() - exact[p]) ** 2 for p in exact)

    assert error(3, True, 1.0) < error(2, True, 1.0) < error(2, True, 0.5)
    assert error(3, True, 0.7) < error(3, False, 0.7)
