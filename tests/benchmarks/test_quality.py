"""Scripts on a tiny library, methods beside dense oracles, published numbers beside their rows."""

import importlib
import json
import re
import shlex
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from helpers.loras import adapters_of, dense, lora_of
from helpers.runs import config_of
from helpers.tiny import SHAPES, library, peft_adapter, task

from benchmarks import RESULTS
from benchmarks.formats.loraquant import LoraQuant, important
from benchmarks.new_task.compose import arithmetic_weights
from benchmarks.quality import ablations, experiment
from benchmarks.quality.methods import METHODS, by_arrival, merged, slots_of
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models import resolve
from d2c_mlx.pipeline import run

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
def whole(paths):
    """A run of the library, as `d2c-mlx run` does it."""
    config = config_of(paths, paths.model.parent / "run", probe_examples=2, baselines=())
    return run(config, quiet=True)


@pytest.fixture
def script(paths, tmp_path, monkeypatch):
    """`script(name, words)` runs it; its result. The tiny model takes the embedded one's place."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    find = resolve._find
    monkeypatch.setattr(resolve, "_find", lambda spec: find(spec or str(paths.model)))

    def call(name, words, result=tmp_path / "result.json"):
        words = words.format(root=paths.model.parent, tmp=tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(words), "--output", str(result)])
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(result.read_text())

    return call


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if how])
def test_a_method_stores_no_more_than_its_budget(whole, method):
    session = whole
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


EXPERIMENT = ("--library {root} --work {tmp}/work --rows {tmp}/kept --budgets 60 --seeds 0,1"
              " --examples 2 --draws 2 --methods 'random;D2C, mean' --tests ")  # fmt: skip


def test_an_experiment_resumes_and_says_what_was_measured(script):
    result = script("quality.experiment", f"{EXPERIMENT} 2")
    rows = {(row["method"], row.get("seed"), row.get("draw")): row for row in result["rows"]}
    assert rows.keys() == {("base", None, None), ("individual", None, None)} | {
        (method, seed, draw)
        for method, draw in (("random", 0), ("random", 1), ("D2C, mean", 0)) for seed in (0, 1)
    }  # fmt: skip
    assert all(0 < row["share"] <= 0.6 for key, row in rows.items() if key[1] is not None)
    (pair,) = result["pairs"]
    assert (pair["method"], pair["beside"], pair["seeds"]) == ("D2C, mean", "random", [0, 1])
    scores = {key: np.mean([score for _, score in row["tasks"].values()])
              for key, row in rows.items()}  # fmt: skip
    gaps = [scores["D2C, mean", seed, 0] - scores["random", seed, draw]
            for seed in (0, 1) for draw in (0, 1)]  # fmt: skip
    assert pair["difference"] == pytest.approx(np.mean(gaps), abs=1e-3)
    # Measured once; what is kept is of these settings.
    assert script("quality.experiment", f"{EXPERIMENT} 2")["rows"] == result["rows"]
    with pytest.raises(SystemExit, match=r"settings\.json: found .*'tests': 2.*'tests': 3"):
        script("quality.experiment", f"{EXPERIMENT} 3")


def test_slots_are_runs(script, whole):
    words = ("--library {root} --work {tmp}/work --cases 'individual;estimates;random' --clusters 2"
             " --seeds 0 --examples 2 --random-seeds 3 --tests 2")  # fmt: skip
    rows = {row["case"]: row for row in script("quality.slots", words)["rows"]}
    assert rows["individual"]["excess"] == 0 and rows["individual"]["kept"] == 1
    pack = whole.read("bench.json")["methods"]["pack"]
    assert rows["estimates"]["excess"] == pytest.approx(pack["excess"], abs=1e-6)
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


def test_commands_that_are_written_down_are_there(monkeypatch, capsys):
    """With their options, and every script has its command on some page."""
    files, helps, names = sorted(ROOT.glob("benchmarks/**/*.py")), {}, set()
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module, name = importlib.import_module(name), name.removesuffix(".__main__")
        if hasattr(module, "main"):
            monkeypatch.setattr(sys, "argv", [name, "--help"])
            pytest.raises(SystemExit, module.main).match("0")
            helps[name] = capsys.readouterr().out
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for path in [*pages, *files, ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"python -m (benchmarks[\w.]+)([^`\n]*)", text):
            names.add(name := name.rstrip("."))
            for option in re.findall(r"(?<![\w-])--[\w-]+", rest):
                assert option in helps[name], f"{path}: {name} {option}"
    assert {name for name in helps if not name.endswith("stock_loop")} == names
