"""benchmarks/library: splits, recipe, manifest, sources that fail, and what its trainers say."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.tiny import ALL, SHAPES, peft_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.library import decay, rows
from benchmarks.library.splits import Row, normal, side, split
from benchmarks.library.tasks import num_date, qa, summ
from benchmarks.library.tasks.messages import group_of, sentences
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.tasks import load_task
from d2c_mlx.utils.files import hash_file

LIBRARY = ROOT / "benchmarks" / "library"
PINS = yaml.safe_load((LIBRARY / "sources.yaml").read_text())
RECIPE = yaml.safe_load((LIBRARY / "recipe.yaml").read_text())["adapters"]
MANIFEST = json.loads((LIBRARY / "manifest.json").read_text())

words = st.sampled_from(["One", "one!", "two", "Three", "four", "five"])
some_rows = st.lists(
    st.builds(
        Row, st.lists(words, min_size=1, max_size=3).map(" ".join), words,
        st.integers(0, 30).map(str), st.lists(words, max_size=1).map(tuple),
    ),
    max_size=80,
)  # fmt: skip


@settings(max_examples=100)
@given(some_rows, st.integers(0, 5), st.randoms(use_true_random=False))
def test_nothing_is_on_two_sides(drawn, seed, draw):
    limits = {"train": 20, "probe": 3, "test": 5}
    splits, dropped = split(drawn, seed, limits)
    groups, prompts, keys = [], [], []
    for name, kept in splits.items():
        assert len(kept) <= limits[name]
        assert all(side(row.group, seed) == name for row in kept)
        groups.append({row.group for row in kept})
        prompts += [normal(row.prompt) for row in kept]
        keys.append({normal(key) for row in kept for key in row.keys})
    assert len(prompts) == len(set(prompts))
    for texts in (groups, keys):
        assert sum(map(len, texts)) == len(set().union(*texts))
    assert sum(map(len, splits.values())) + sum(dropped.values()) == len(drawn)
    draw.shuffle(drawn)
    assert split(drawn, seed, limits) == (splits, dropped)


def test_manifest_recipe_sources_and_results_agree():
    names = [adapter["task"] for adapter in RECIPE]
    assert len(names) == len(set(names)) >= 32
    trained = json.loads((LIBRARY.parent / "results" / "library.json").read_text())["rows"]
    assert set(names) == {row["name"] for row in trained}
    assert MANIFEST["failed"] == {} and set(MANIFEST["tasks"]) == set(rows.TASKS)
    for name, line in MANIFEST["tasks"].items():
        module, kind, language = rows.TASKS[name]
        assert [source["name"] for source in line["sources"]] == list(module.needs(kind, language))
        for source in line["sources"]:
            assert source["sha256"] == PINS[source["name"]]["sha256"] and source["version"]
        assert line["ship"] == all(PINS[source["name"]]["ship"] for source in line["sources"])
        assert line["rows"]["probe"] == 40 and line["rows"]["test"] >= rows.LEAST["test"]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in line["sha256"].values())
    assert all(MANIFEST["tasks"][name]["rows"]["train"] >= 300 for name in names)


def archive(path, language):
    """An npm package of CLDR with one calendar; its pin."""
    months = {str(i): f"Month{i:02}" for i in range(1, 13)}
    calendar = {"dateFormats": {"long": "MMMM d, y"}, "months": {"format": {"wide": months}}}
    tree = {"main": {language: {"dates": {"calendars": {"gregorian": calendar}}}}}
    data = json.dumps(tree).encode()
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"package/main/{language}/ca-gregorian.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return {"url": path.as_uri(), "sha256": hash_file(path), "licence": "none", "ship": True}


def test_a_bad_source_is_one_line_and_the_others_are_made_and_mended(tmp_path, capsys):
    good = archive(tmp_path / "cldr.tgz", "en")
    paths = {"output": "rows", "cache": "cache", "sources": "sources.yaml"}
    words = [f"--{name}={tmp_path / path}" for name, path in paths.items()]
    words += ["--only", "summ-en,date-en"]
    output = tmp_path / "rows"
    for bad in ({"url": "http://127.0.0.1:9/index.xz"}, {"sha256": "0" * 64}):
        pins = {"debian-en": good | bad, "cldr-dates": good}
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump(pins))
        assert rows.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "debian-en" in line and "summ-en" in line and not (output / "summ-en").exists()
    manifest = json.loads((output / "manifest.json").read_text())
    assert list(manifest["tasks"]) == ["date-en"] and list(manifest["failed"]) == ["summ-en"]
    task = load_task(output / "date-en")
    assert (len(task.probe), len(task.test)) == (40, 200)
    (tmp_path / "cldr.tgz").unlink()  # it is in the cache
    file = output / "date-en" / "train.jsonl"
    before = hash_file(file)
    for change, there in ((0, True), (9, False)):
        file.write_text(file.read_text()[: -change or None])
        rows.main([*words[:-1], "date-en"])
        assert ("there already" in capsys.readouterr().out) == there
        assert hash_file(file) == before


def test_texts_are_parsed():
    pattern, months = "d 'de' MMMM 'de' y", {"3": "março"}
    date = num_date.datetime.date(2001, 3, 9)
    assert num_date.write_date(date, pattern, months) == "9 de março de 2001"
    names = ("libfoo1", "foo-doc", "python3-foo", "libfoo-dev")
    assert {summ.family(name) for name in names} == {"foo"}
    index = "Package: a\nDescription-md5: 0\nDescription-de: Kurz\n Erste\n Zeile.\n .\n Zweite.\n"
    assert list(summ.packages(index)) == [("a", "Kurz", "Erste Zeile.")]
    assert group_of("The order has been paid.") == group_of("The order has been canceled!")
    kept = sentences({("", "Hello you all there"): "Das ist ein Satz. Und <b>das</b> ist keiner."})
    assert kept == {"Das ist ein Satz.": "message hello you all there"}
    assert qa.only(["a", "b"]) is None and qa.only({"EUR": {}}) == "EUR"


def test_spectra_are_those_of_the_dense_update(tmp_path):
    # Rank 32 is the full rank of most modules, and more than k_proj and v_proj have.
    adapter = read_adapter(peft_adapter(tmp_path, "large", 32, targets=tuple(SHAPES)), ALL)
    loras = adapter.modules.values()
    curves, effective, stable = [], [], []
    for matrix in (lora.delta().astype(np.float64) for lora in loras):
        values = np.linalg.svd(matrix, compute_uv=False)
        values = np.pad(values, (0, 32))[:32]
        curves.append((values**2).cumsum() / (values**2).sum())
        shares = values[values > 1e-9] / values.sum()
        effective.append(np.exp(-(shares * np.log(shares)).sum()))
        stable.append(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    line = decay.summary([decay.singular_values(*lora.factors()) for lora in loras])
    assert line["modules"] == len(loras) and line["zero_modules"] == 0
    assert line["cumulative"] == pytest.approx(np.mean(curves, axis=0), abs=2e-6)
    assert line["effective_rank"] == pytest.approx(np.mean(effective), rel=1e-4)
    assert line["stable_rank"] == pytest.approx(np.mean(stable), rel=1e-4)
    for share in (90, 99):
        ranks = [sum(curve < share / 100) + 1 for curve in curves]
        assert line[f"rank_{share}"] == np.mean(ranks)
