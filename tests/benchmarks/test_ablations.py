"""benchmarks/quality/ablations.py: all of it on a tiny model, beside dense oracles, and resumed."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny import library, log_probabilities, task

from benchmarks import RESULTS
from benchmarks.quality import ablations
from benchmarks.quality.methods import by_features, merged
from benchmarks.tables.pages import TABLES
from d2c_mlx.cluster.partition import INITS
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow

NAMES = ["date-en", "gec-en", "num-de", "qa-de", "reply-fr", "summ-en"]
CASES = {
    "agreement": 3, "init": len(INITS), "restarts": 3, "score": 2, "examples": 10,
}  # fmt: skip


@pytest.fixture
def paths(tmp_path):
    found = library(tmp_path, NAMES)
    for name in NAMES:
        task(found.tasks, name, n_probe=20)
    return found


@pytest.fixture
def call(paths, tmp_path, monkeypatch):
    monkeypatch.delenv("D2C_MLX_CACHE", raising=False)

    def measured(**options):
        given = {"library": tmp_path, "work": tmp_path / "work", "budget": 50, "tests": 2,
                 "model": paths.model, "output": tmp_path / "found.json"} | options  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
        ablations.main()
        return json.loads((tmp_path / "found.json").read_text())["rows"]

    return measured


def test_all_cases_and_seeds_and_none_twice(call, capsys, tmp_path):
    rows = call(seeds="0,1")
    counts = {case: [row["seed"] for row in rows if row["case"] == case] for case in CASES}
    # Twenty probe rows of twenty are those of one seed.
    most = {case: n + (n if case != "examples" else n - 2) for case, n in CASES.items()}
    assert {case: len(seeds) for case, seeds in counts.items()} == most
    out = capsys.readouterr().out
    assert "seed 1, examples: 20, mean: not measured, too few probe rows" in out
    assert call(seeds="0,1", cases="init;score") == rows
    assert not capsys.readouterr().out
    # Rows outlive the work directory, one line each; what is published of others is not mixed in.
    kept = shutil.move(tmp_path / "work" / "rows", tmp_path / "kept")
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "found.json").write_text('{"rows": [{"case": "init"}]}')
    files = list((kept / "ablations").iterdir())
    assert len(files) == len(rows) and all(file.read_text().count("\n") == 1 for file in files)
    assert call(seeds="0,1", rows=kept, cases="init;score") == rows
    with pytest.raises(SystemExit, match=r"settings\.json: found .*'tests': 2, .*'tests': 3"):
        call(seeds="0,1", rows=kept, tests=3)
    # The paper's loop starts where K-Means ends, and only goes down by what decides.
    named = {(row["case"], row["value"], row["seed"]): row for row in rows}
    for seed in (0, 1):
        one, three, five = (named["restarts", n, seed]["probe_regret"] for n in "135")
        assert five <= three + 1e-6 and three <= one + 1e-6
        assert one == named["init", "adapters", seed]["probe_regret"]
        same = named["score", "loss", seed], named["init", "kmeans", seed]
        assert same[0]["clusters"] == same[1]["clusters"]
        assert same[0]["excess"] == pytest.approx(same[1]["excess"], abs=1e-6)
    found = {"ablations": {"rows": rows}}
    table = TABLES["ablations"](found.__getitem__)
    assert len(table) == 2 + sum(CASES.values())
    for line in table[2:]:
        assert line.endswith("| 0 |" if "| examples | 20, " in line else "| 0, 1 |")


def test_agreement_is_that_of_plain_losses(paths, tmp_path):
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        output=str(tmp_path / "run"), budget="50%", probe_examples=10, test_examples=4,
    )  # fmt: skip
    session = run(config, until="probe", quiet=True)
    stored = merged(session, by_features, "linear", int(0.5 * session.capacity.total), 0)
    adapters = list({one.digest: one for one in stored.serves.values()}.values())
    assert len(adapters) == 3

    def loss(adapter, one):
        each = [
            log_probabilities(session.library.base, adapter, example) for example in one.examples
        ]
        targets = [example.tokens[example.first_target :] for example in one.examples]
        found = [-p[range(len(t)), list(t)] for p, t in zip(each, targets)]
        return np.concatenate(found).mean()

    by_probes, by_tests = (
        np.array([[loss(adapter, one) for adapter in adapters] for one in sets])
        for sets in (session.library.calibration, session.library.held_out)
    )
    own = np.array([adapters.index(stored.serves[name]) for name in session.library.names])
    chosen, best, rows = by_probes.argmin(axis=1), by_tests.argmin(axis=1), range(len(NAMES))
    found = ablations.agreement(session, stored)
    assert found["agree"] == (chosen == best).mean()
    assert found["own_is_best"] == (own == best).mean()
    cost = (by_tests[rows, chosen] - by_tests[rows, best]).mean()
    assert found["costs"] == pytest.approx(cost, abs=1e-5)


def test_what_is_published_is_what_its_rows_say():
    published = json.loads((RESULTS / "ablations.json").read_text())
    options = SimpleNamespace(rows=RESULTS / "rows_24", budget=12.5)
    assert ablations.summary(options) == published
