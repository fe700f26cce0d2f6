"""Methods of other packages: used, checked, and known to finished runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.loras import inputs_of
from helpers.runs import flags_of, stages_started
from helpers.tiny import ALL, library

from d2c_mlx import merge_adapters, read_adapter
from d2c_mlx.pipeline import run
from d2c_mlx.plugins import COMPOSE_METHODS, MERGE_METHODS, find, plugins
from d2c_mlx.run.doctor import diagnose
from d2c_mlx.utils.errors import ConfigError, D2CError

GROUPS = {"merge": MERGE_METHODS, "compose": COMPOSE_METHODS}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(package, code, merge=[names], compose=[names])`: a module with entry points."""

    def put(package, code, version="1.0", **entries):
        folder = tmp_path / f"site-{package}-{version}"
        about = folder / f"{package}-{version}.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        about.joinpath("METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
        lines = []
        for kind, listed in entries.items():
            lines += [f"[{GROUPS[kind]}]", *(f"{name} = {package}:{name}" for name in listed)]
        about.joinpath("entry_points.txt").write_text("\n".join(lines))
        (folder / f"{package}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, package, raising=False)
        plugins.cache_clear()
        return folder

    yield put
    plugins.cache_clear()


MEAN = """
import numpy as np
def plain(factors, options):
    u, s, v = np.linalg.svd(sum(a @ b for a, b in factors) / len(factors), full_matrices=False)
    return u[:, :options.rank] * s[:options.rank], v[:options.rank]
"""


FACTS = """
from d2c_mlx.merge.methods import METHODS, MergeMethod
import numpy as np
def beside(factors, options):
    shares = [b * np.float32(w) for (_, b), w in zip(factors, options.weights)]
    return np.hstack([a for a, _ in factors]), np.vstack(shares)
summed = MergeMethod(beside, weighted=True, sums_ranks=True)
again = MergeMethod(METHODS["regmean"].merge, reads_inputs=True)
"""


def test_a_merge_by_a_plug_in_is_what_it_computes_of_what_it_declares(install, tmp_path):
    adapters = [read_adapter(library(tmp_path, "ab").adapters / name, ALL) for name in "ab"]
    install("facts", MEAN + FACTS, merge=("plain", "summed", "again"))
    with pytest.raises(ConfigError, match="activations: 'again' needs 2 arrays"):
        merge_adapters(adapters, "again")
    regmean, again = (
        merge_adapters(adapters, name, activations=inputs_of(adapters))
        for name in ("regmean", "again")
    )
    assert again.digest == regmean.digest
    linear, plain = (merge_adapters(adapters, name) for name in ("linear", "plain"))
    merged = merge_adapters(adapters, "summed", rank=1, weights=[2.0, -1.0])
    assert {lora.rank for lora in merged.modules.values()} == {8}
    for path, lora in merged.modules.items():
        a, b = (adapter.modules[path].delta() for adapter in adapters)
        np.testing.assert_allclose(lora.delta(), 2 * a - b, atol=1e-6)
        deltas = (merge.modules[path].delta() for merge in (plain, linear))
        np.testing.assert_allclose(*deltas, atol=1e-6)


@pytest.mark.slow
def test_a_run_by_plug_ins_is_made_anew_when_their_code_or_version_changes(install, config):
    install("of_mean", MEAN, merge=["plain"])
    config = config.replace(merge_method="plain")
    session = run(config, quiet=True)
    assert {merge["method"] for merge in session.read("merges.json")} == {"plain", "none"}
    assert session.read("bench.json")["provenance"]["plugins"] == [
        "merge method 'plain' of of_mean 1.0 (of_mean:plain)",
    ]
    for version, code in (("1.0", MEAN), ("1.0", f"{MEAN}\n# x"), ("1.1", f"{MEAN}\n# x")):
        first = stages_started(session.output)
        install("of_mean", code, version, merge=["plain"])
        run(config, until="merge", quiet=True)
        again = stages_started(session.output)
        changed = {name for name in first if again.get(name) != first[name]}
        assert not changed if code == MEAN else changed >= {"merge"}
        assert not changed & {"convert", "probe"}


def test_the_content_of_a_package_is_all_of_its_files(install):
    folder = install("pack_age", "", merge=["own"])
    (folder / "pack_age").mkdir()
    (folder / "pack_age.py").rename(folder / "pack_age" / "__init__.py")
    before = find(MERGE_METHODS, "own").identity
    assert before[:3] == ["pack_age", "1.0", "pack_age:own"]
    (folder / "pack_age" / "helper.py").write_text("x = 1")
    assert find(MERGE_METHODS, "own").identity != before


MERGES = {
    "return a": "returned float32 array of (32, 4), expected two float arrays of (32, k) and",
    "return b.T, a.T": "returned float32 array of ({out}, 4) and float32 array of (4, 32), exp",
    "return np.hstack([a, a]), np.vstack([b, b])": "returned float32 array of (32, 8) and",
    "return a.astype(int), b.tolist()": "returned int64 array of (32, 4) and list, expected two",
    "return a.astype(float) + 1e300, b": "returned 128 values that are not finite in float32",
    "a[:] = 0": "failed: ValueError: assignment destination is read-only (liar.py, line 4)",
    "raise SystemExit('a\\nb')": "failed: SystemExit: a (liar.py, line 4)",
}


def test_a_merge_that_fails_or_is_none_is_a_line_that_names_the_plug_in(install, tmp_path):
    paths = library(tmp_path, ["a", "b"])
    adapters = [read_adapter(paths.adapters / name, ALL) for name in "ab"]
    for i, (body, problem) in enumerate(MERGES.items()):
        code = f"import numpy as np\ndef bad(factors, _):\n    a, b = factors[0]\n    {body}\n"
        install("liar", code, f"{i}", merge=["bad"])
        caught = pytest.raises(D2CError, merge_adapters, adapters, "bad")
        (line,) = str(caught.value).splitlines()
        start = f"merge method 'bad' of liar {i} (liar:bad): {problem}"
        assert any(line.startswith(start.format(out=out)) for out in (32, 16)), line


def test_plug_ins_that_cannot_be_used_are_told_before_anything_is_written(install, config, command):
    install("broken", "import no_such_module", merge=("gone", "twice"))
    install("third", "fine = 3\ndef ties(): pass", merge=("fine", "twice", "ties"))
    for name, start in (
        ("gone", "merge method 'gone' of broken 1.0 (broken:gone): cannot be imported"),
        ("fine", "merge method 'fine' of third 1.0 (third:fine): found int"),
        ("twice", "merge_method: found merge method 'twice' of broken 1.0"),
        ("none", "merge_method: found 'none', expected one of"),
    ):
        code, _, err = command("run", *flags_of(config), "--merge-method", name)
        assert (code, err.count("\n")) == (2, 1) and not Path(config.output).exists()
        assert err.startswith(f"error: {start}")
    advice = {x.value: x.advice for x in diagnose() if x.name == "plug-in"}
    assert "another one has that name" in advice["merge method 'ties' of third 1.0 (third:ties)"]
    assert "found int" in advice["merge method 'fine' of third 1.0 (third:fine)"]


def test_a_way_to_compose_is_found_by_name_and_says_what_it_needs(install, command, tmp_path):
    install("mine", """
from d2c_mlx.compose.methods import Method
def first(task, rows, choice):
    return task.library[0]
needs = Method(first, (0.5, 1.0), needs_prompts=True)
def bad(task, rows, choice):
    return first(task, rows, choice).modules
""", compose=("first", "needs", "bad"))  # fmt: skip
    paths = library(tmp_path, ["a", "b"])
    options = {"from": paths.adapters, "task": paths.tasks / "a", "model": paths.model}
    pairs = [f"--{name}={value}" for name, value in options.items()]
    argv = ["compose", *pairs, f"--output={tmp_path / 'new'}", "--json", "--method"]
    code, out, err = command(*argv, "first")
    assert code == 0, err
    about = json.loads(out)
    assert about["candidates"].keys() == {"base", "best", "first"} and about["choice"] == 1.0
    own = read_adapter(paths.adapters / "a", ALL)
    assert read_adapter(tmp_path / "new").modules.keys() == own.modules.keys()
    code, _, err = command(*argv, "needs")
    assert code == 2 and err.startswith("error: method: needs compares prompts, and those of")
    code, _, err = command(*argv, "bad")
    assert code == 1 and err.split("\n", 1)[1].startswith(
        "error: compose method 'bad' of mine 1.0 (mine:bad): retur"
    )
