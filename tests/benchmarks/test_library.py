"""benchmarks/library: splits, the recipe, the committed manifest, and sources that fail."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
import yaml
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.library import rows as library
from benchmarks.library.splits import Row, normal, side, split
from benchmarks.library.tasks import num_date, qa, summ, tone
from benchmarks.library.tasks.messages import group_of, sentences
from benchmarks.library.tasks.words import WORDS
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


@settings(max_examples=200)
@given(some_rows, st.integers(0, 5), st.randoms(use_true_random=False))
def test_nothing_is_on_two_sides(rows, seed, draw):
    limits = {"train": 20, "probe": 3, "test": 5}
    splits, dropped = split(rows, seed, limits)
    groups, prompts, keys = ([], [], [])
    for name, kept in splits.items():
        assert len(kept) <= limits[name]
        assert all(side(row.group, seed) == name for row in kept)
        groups.append({row.group for row in kept})
        prompts += [normal(row.prompt) for row in kept]
        keys.append({normal(key) for row in kept for key in row.keys})
    assert len(prompts) == len(set(prompts))
    for texts in (groups, keys):
        assert sum(map(len, texts)) == len(set().union(*texts))
    assert sum(map(len, splits.values())) + sum(dropped.values()) == len(rows)
    draw.shuffle(rows)
    assert split(rows, seed, limits) == (splits, dropped)


def test_recipe_is_valid_and_varied():
    names = [one["task"] for one in RECIPE]
    assert len(names) == len(set(names)) >= 32
    # What is published is of all of them.
    trained = json.loads((LIBRARY.parent / "results" / "library.json").read_text())["rows"]
    assert set(names) == {row["name"] for row in trained}
    for one in RECIPE:
        assert set(one) == {"task", "rank", "alpha", "targets", "rslora", "layers", "steps", "seed"}
        assert one["task"] in library.TASKS
        assert min(one["rank"], one["alpha"], one["steps"]) > 0 and one["seed"] >= 0
        assert one["targets"] in ("q,k,v,o", "all-linear") and isinstance(one["rslora"], bool)
        assert one["layers"] == "all" or one["layers"] > 0
    strong = [one for one in RECIPE if one["rank"] == 32 and one["targets"] == "all-linear"
              and one["steps"] >= 300 and one["layers"] == "all"]  # fmt: skip
    assert len(strong) >= 6 and len({one["task"].split("-")[0] for one in strong}) >= 5
    assert {one["rank"] for one in RECIPE} >= {4, 8, 16, 32}
    assert {one["rslora"] for one in RECIPE} == {True, False}
    assert {one["layers"] for one in RECIPE} == {"all", 16}


def test_manifest_agrees_with_recipe_and_sources():
    assert MANIFEST["failed"] == {} and set(MANIFEST["tasks"]) == set(library.TASKS)
    for name, line in MANIFEST["tasks"].items():
        module, kind, language = library.TASKS[name]
        assert [one["name"] for one in line["sources"]] == list(module.needs(kind, language))
        for one in line["sources"]:
            assert one["sha256"] == PINS[one["name"]]["sha256"] and one["version"]
        assert line["ship"] == all(PINS[one["name"]]["ship"] for one in line["sources"])
        assert line["rows"]["probe"] == 40 and line["rows"]["test"] >= library.LEAST["test"]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in line["sha256"].values())
    for one in RECIPE:
        assert MANIFEST["tasks"][one["task"]]["rows"]["train"] >= 300


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


def run(tmp_path, pins, names):
    """Run rows.py with pins of one's own."""
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(pins))
    paths = {"output": "rows", "cache": "cache", "sources": "sources.yaml"}
    options = [f"--{name}={tmp_path / path}" for name, path in paths.items()]
    command = [sys.executable, "-m", "benchmarks.library.rows", *options, "--only", names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120,
                          cwd=ROOT)  # fmt: skip


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/index.xz", "file:///nowhere/index.xz", "sha"])
def test_bad_source_is_one_line_and_the_other_tasks_are_made(tmp_path, url):
    good = archive(tmp_path / "cldr.tgz", "en")
    bad = good | {"sha256": "0" * 64} if url == "sha" else good | {"url": url}
    pins = {"debian-en": bad, "cldr-dates": good}
    done = run(tmp_path, pins, "summ-en,date-en")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert "debian-en" in done.stderr and "summ-en" in done.stderr
    assert not (tmp_path / "rows" / "summ-en").exists()
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert list(manifest["tasks"]) == ["date-en"] and list(manifest["failed"]) == ["summ-en"]
    task = load_task(tmp_path / "rows" / "date-en")
    assert (len(task.probe), len(task.test)) == (40, 200)


def test_run_goes_on_and_mends_what_was_changed(tmp_path):
    pins = {"cldr-dates": archive(tmp_path / "cldr.tgz", "en")}
    assert "there already" not in run(tmp_path, pins, "date-en").stdout
    file = tmp_path / "rows" / "date-en" / "train.jsonl"
    before = hash_file(file)
    (tmp_path / "cldr.tgz").unlink()  # it is in the cache
    assert "there already" in run(tmp_path, pins, "date-en").stdout
    file.write_text(file.read_text()[:-9])
    assert "there already" not in run(tmp_path, pins, "date-en").stdout
    assert hash_file(file) == before


def test_texts_are_parsed():
    pattern, months = "d 'de' MMMM 'de' y", {"3": "março"}
    assert num_date.write_date(num_date.datetime.date(2001, 3, 9), pattern, months) == (
        "9 de março de 2001"
    )
    assert {summ.family(one) for one in ("libfoo1", "foo-doc", "python3-foo", "libfoo-dev")} == {
        "foo"
    }
    index = "Package: a\nDescription-md5: 0\nDescription-de: Kurz\n Erste\n Zeile.\n .\n Zweite.\n"
    assert list(summ.packages(index)) == [("a", "Kurz", "Erste Zeile.")]
    assert group_of("The order has been paid.") == group_of("The order has been canceled!")
    found = sentences({("", "Hello you all there"): "Das ist ein Satz. Und <b>das</b> ist keiner."})
    assert found == {"Das ist ein Satz.": "message hello you all there"}
    assert qa.only(["a", "b"]) is None and qa.only({"EUR": {}}) == "EUR"


@pytest.mark.parametrize("formal, informal, language, same", [
    ("Elija sus intereses.", "Elige tus intereses.", "es", True),
    ("Cerrar las pestañas duplicadas", "Cerrar las Pestañas Duplicadas", "es", False),
    ("Bitte wählen Sie ein Datum.", "Bitte wähle ein Datum.", "de", True),
    ("Sie wählen Ihr Datum.", "Such dir bitte einen anderen Termin aus.", "de", False),
    ("U hebt geen wijzigingen.", "Je hebt geen wijzigingen.", "nl", True),
    ("Uw winkel is niet live.", "Zo kan je niets verkopen vandaag.", "nl", False),
])  # fmt: skip
def test_register_is_told_from_another_translation(formal, informal, language, same):
    assert tone.Register(WORDS["registers"][language]).changes(formal, informal) is same
