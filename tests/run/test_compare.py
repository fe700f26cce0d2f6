"""Many runs in one table: the numbers of single runs, resumed, on the same clusters."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.command import typed
from helpers.runs import stages_started
from helpers.tiny import library, peft_adapter
from scipy.stats import bootstrap

from d2c_mlx.evaluate.heldout import paired_bootstrap
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import load_config
from d2c_mlx.run.run import Run

METHODS = ["linear", "ties", "regmean"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six adapters of unlike strength, which methods cluster otherwise, and a file of options."""
    root = tmp_path_factory.mktemp("six")
    paths = library(root, list("abcdef"))
    for seed, name in enumerate("abcdef"):
        peft_adapter(paths.adapters, name, alpha=20 * (1 + seed % 3), seed=seed)
    lines = [f"{name}: {path}" for name, path in paths._asdict().items()]
    lines += ["probe_examples: 3", "test_examples: 4"]
    (root / "six.yaml").write_text("\n".join(lines))
    return root


def argv(root, methods=METHODS, budgets="2,60%", **options):
    given = {"merge-methods": ",".join(methods), "budgets": budgets, **options}
    return ["compare", root / "six.yaml", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def compared(root):
    return typed(*argv(root, output=root / "out"))


@pytest.mark.slow
def test_one_command_gives_the_numbers_of_single_runs(root, compared, tmp_path):
    rows = json.loads((root / "out" / "compare.json").read_text())
    table = (root / "out" / "compare.md").read_text()
    assert compared.endswith(table) and len(rows) == table.count("\n| ")
    first, *others, plan = rows
    assert first["beside_first"] is None is plan["beside_first"]
    for row in others:
        pair = row["beside_first"]
        assert f"{row['excess']:.4f}" in table and f"| {pair['difference']:+.4f} (" in table
        assert pair["low"] <= pair["difference"] <= pair["high"]
        assert pair["difference"] == pytest.approx(row["loss"] - first["loss"], abs=1e-5)
    runs = {(row["budget"], row["method"]): row for row in rows}
    assert [*runs] == [*(("2", method) for method in METHODS), ("60%", "plan")]
    first = str(tmp_path / METHODS[0] / "clusters.json")
    for i, method in enumerate(METHODS):
        options = {"budget": "2", "baselines": (), "clusters": first if i else ""}
        options |= {"merge_method": method, "output": str(tmp_path / method)}
        session = run(load_config(root / "six.yaml", options), quiet=True)
        alone = session.read("bench.json")["methods"]["pack"]
        assert {key: runs["2", method][key] for key in alone} == alone
        merges = session.read("merges.json")
        assert merges == json.loads((root / "out" / f"{method}-2" / "merges.json").read_text())


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_repeats_nothing(root, compared, command, tmp_path):
    out = shutil.copytree(root / "out", tmp_path / "out")
    words = argv(root, METHODS[:2], "2", output=out)
    assert command(*words)[0] == 0
    first = stages_started(out / "ties-2")
    (out / "compare.md").unlink()
    code, text, _ = command(*words, D2C_MLX_CACHE=str(tmp_path / "cold"))
    assert code == 0 and stages_started(out / "ties-2") == first
    assert "| 2 | ties |" in text and text == (out / "compare.md").read_text()


def test_all_bad_input_is_told_at_once_and_nothing_is_written(root, command, tmp_path):
    (tmp_path / "few.json").write_text('[["a"]]')
    adapters = shutil.copytree(root / "adapters", tmp_path / "adapters")
    (adapters / "a").rename(adapters / "aa")
    out, methods = tmp_path / "out", ["linear", "ties"]
    for words, fields in (
        (
            argv(root, ["linear", "tias"], "2,3x", output=out, seed=-1),
            ["merge_method", "budget", "seed"],
        ),
        # What only the files tell: a task and a file of clusters.
        (argv(root, methods, output=out, adapters=adapters), ["tasks/aa"]),
        (argv(root, methods, output=out, clusters=tmp_path / "few.json"), ["clusters"]),
        (argv(root, "", "", output=out), ["merge_methods", "budgets"]),
    ):
        code, _, err = command(*words)
        lines = err.splitlines()
        assert code == 2 and len(lines) == len(fields) and not out.exists()
        assert all(any(field in line for line in lines) for field in fields), err


@pytest.mark.slow
def test_a_run_tells_the_interval_of_its_excess(root, compared):
    """That of rows that are evaluated one by one."""
    out = root / "out" / "linear-2"
    session, pack = Run(load_config(out / "config.yaml", {})), load_pack(out / "pack")
    scorer, tests = session.library.scorer, session.library.held_out
    own = dict(zip("abcdef", session.library.adapters))

    def one_by_one(adapters):
        rows = {}
        for test in tests:
            single = [replace(test, examples=(row,), cuts=()) for row in test.examples]
            n = [row.n_targets for row in test.examples]
            (losses,) = scorer.losses([(adapters[test.task], single)])
            rows[test.task] = np.stack([losses * n, n], axis=1)
        return rows

    expected = paired_bootstrap(one_by_one({x: pack.load(x) for x in own}), one_by_one(own))
    low, high = session.read("bench.json")["interval"].values()
    assert (low, high) == pytest.approx((expected["low"], expected["high"]), abs=1e-5)


def test_the_bootstrap_of_one_task_is_scipys():
    rng = np.random.default_rng(0)
    n = rng.integers(2, 9, 40)
    a, b = (np.stack([n * rng.gamma(3, shift, 40), n], axis=1) for shift in (0.3, 0.32))
    interval = paired_bootstrap({"t": a}, {"t": b}, n=4000)

    def difference(i):
        return (a[i, 0].sum() - b[i, 0].sum()) / a[i, 1].sum()

    theirs = bootstrap((np.arange(40),), difference, vectorized=False, n_resamples=4000,
                       method="percentile", rng=1)  # fmt: skip
    low, high = theirs.confidence_interval
    assert interval["difference"] == pytest.approx(difference(np.arange(40)))
    assert (interval["low"], interval["high"]) == pytest.approx((low, high), abs=0.05)
    again = paired_bootstrap({"u": b, "t": a}, {"t": b, "u": a}, n=4000)
    assert again["difference"] == pytest.approx(0) and again["low"] < 0 < again["high"]
