"""benchmarks/library: splits, recipe and manifest, and how fast singular values fall."""

import json
import re

import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.tiny import ALL, SHAPES, peft_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.library import decay, rows
from benchmarks.library.splits import Row, normal, side, split
from d2c_mlx.adapters.reading import read_adapter

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


def test_spectra_are_those_of_the_dense_update(tmp_path):
    # Rank 32 is the full rank of most modules, and more than k_proj and v_proj have.
    adapter = read_adapter(peft_adapter(tmp_path, "large", 32, targets=tuple(SHAPES)), ALL)
    loras = adapter.modules.values()
    spectra = [np.linalg.svd(lora.delta().astype(float), compute_uv=False) for lora in loras]
    curves = [np.pad((x**2).cumsum() / (x**2).sum(), (0, 32), "edge")[:32] for x in spectra]
    shares = [x[x > 1e-9] / x.sum() for x in spectra]
    line = decay.summary([decay.singular_values(*lora.factors()) for lora in loras])
    assert line["cumulative"] == pytest.approx(np.mean(curves, axis=0), abs=2e-6)
    for name, values in (
        ("effective_rank", [np.exp(-(share * np.log(share)).sum()) for share in shares]),
        ("stable_rank", [(x**2).sum() / x[0] ** 2 for x in spectra]),
        *((f"rank_{n}", [sum(curve < n / 100) + 1 for curve in curves]) for n in (90, 99)),
    ):
        assert line[name] == pytest.approx(np.mean(values), rel=1e-4), name
