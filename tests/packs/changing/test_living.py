"""Packs that change: against dense oracles, within the budget, nothing else touched."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.changing import ABOUT, NAMES, deltas
from helpers.tiny import LAYERS

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.packs.add import add_adapter
from d2c_mlx.packs.export import verify
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.update import list_pack, opened, remove_tasks
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import BudgetError, InputError, PackError
from d2c_mlx.utils.files import hash_tree


def plain(directory, slots, budget="2", max_bytes=None):
    made = [replace(adapter, sources=tuple(tasks)) for adapter, tasks in slots]
    return write_pack(directory, made, Manifest(budget=budget, max_bytes=max_bytes, **ABOUT))


@pytest.fixture
def pack(tmp_path, adapters):
    return plain(tmp_path / "pack", [(adapters["a"], ["a"]), (adapters["b"], ["b"])])


def assert_close(found, expected, atol=1e-4):
    found = deltas(found)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=atol)


def test_an_arrival_gets_a_slot_of_its_own_while_there_is_one(pack, adapters):
    before = {name: hash_tree(pack.path / f"cluster-{name}") for name in "01"}
    found = add_adapter(pack, adapters["c"], budget="3")
    assert (found.adapter, found.joined) == ("cluster-2", ())
    now = verify(pack.path)
    assert now.tasks == {"a": "cluster-0", "b": "cluster-1", "c": "cluster-2"}
    assert now.load("c").digest == adapters["c"].uniform().digest
    assert {name: hash_tree(pack.path / f"cluster-{name}") for name in "01"} == before
    assert now.manifest.to_json()["budget"] == {"text": "3", "nbytes": None}
    assert "merged" not in json.loads((now.path / "manifest.json").read_text())


def test_a_full_pack_merges_into_the_slot_most_alike(pack, adapters):
    """Two thirds of the way to b; the similarity is that of dense dW."""
    near = {
        path: LoRA(lora.a, lora.b, lora.scale * 2) for path, lora in adapters["b"].modules.items()
    }
    mixed = merge_adapters([adapters["d"], Adapter("near", near)], weights=[0.5, 0.5])
    new = replace(mixed, name="new")
    found = add_adapter(pack, new)
    assert (found.adapter, found.joined) == ("cluster-1", ("b",))
    dense = [np.concatenate([x.ravel() for _, x in sorted(deltas(one).items())])
             for one in (adapters["b"], new)]  # fmt: skip
    cosine = dense[0] @ dense[1] / np.linalg.norm(dense[0]) / np.linalg.norm(dense[1])
    assert found.similarity == pytest.approx(cosine, abs=1e-3)
    half = {p: (deltas(adapters["b"])[p] + deltas(new)[p]) / 2 for p in new.modules}
    assert_close(found.pack.load("new"), half)
    assert found.pack.load("b").digest == found.pack.load("new").digest
    assert found.pack.load("a").digest == pack.load("a").digest


def test_arrivals_one_by_one_are_the_mean_of_all(tmp_path, adapters):
    """K-Merge's weights 1 - 1/n and 1/n: a running mean."""
    pack = plain(tmp_path / "pack", [(adapters["a"], ["a"])], "1")
    for name in "bcd":
        pack = add_adapter(pack, adapters[name]).pack
    mean = {
        path: sum(deltas(adapters[name])[path] for name in NAMES) / 4
        for path in adapters["a"].modules
    }
    assert_close(pack.load("a"), mean, atol=2e-4)
    assert list_pack(pack)[0]["merged"] == 4
    # What left is still in it: the next one weighs a fifth.
    pack = remove_tasks(pack, ["b", "c"])
    assert pack.manifest.merged == {"cluster-0": 4}
    pack = add_adapter(pack, replace(adapters["b"], name="again")).pack
    fifth = {p: 0.8 * mean[p] + 0.2 * deltas(adapters["b"])[p] for p in mean}
    assert_close(pack.load("again"), fifth, atol=3e-4)


def test_an_arrival_joins_what_is_alike_until_the_budget_has_a_slot(pack, adapters):
    alike = float(similarity([adapters["a"], adapters["b"], adapters["c"]])[-1][:-1].max())
    kept = add_adapter(pack, adapters["c"], budget="2")
    assert kept.adapter in ("cluster-0", "cluster-1") and kept.similarity == pytest.approx(
        alike, abs=1e-3
    )
    opened = add_adapter(kept.pack, adapters["d"], budget="3")
    assert opened.adapter == "cluster-2"


def test_bytes_of_a_plain_pack_do_not_grow_beyond_its_budget(tmp_path, adapters):
    slots = [(adapters["a"], ["a"]), (adapters["b"], ["b"])]
    size = plain(tmp_path / "pack", slots).nbytes
    pack = plain(tmp_path / "pack", slots, "20MB", size + 2000)
    wide = merge_adapters([adapters["c"], adapters["d"]], "concat")
    assert wide.rank == 8
    found = add_adapter(pack, replace(wide, name="wide"))
    assert found.joined and found.pack.nbytes <= size + 2000 and found.pack.load("wide").rank == 4
    # With room for it, it gets its own.
    pack = plain(tmp_path / "more", slots, "20MB", 3 * size)
    assert add_adapter(pack, replace(wide, name="wide")).adapter == "cluster-2"


class Cheapest:
    """A judge of weights: which slots it was asked about, and the merge at the largest scale."""

    def best(self, merges, slots, served, new):
        self.asked = sorted(merges)
        return self.asked[0], scaled(merges[self.asked[0]], 16.0)


@pytest.mark.parametrize("judge", [None, Cheapest()])
def test_an_arrival_with_other_modules_is_merged_at_the_rank_that_fits(tmp_path, adapters, judge):
    """Half of the modules are the slot's, so its rank on those of both is too much."""
    paths = sorted(adapters["a"].modules)
    halves = [paths[: len(paths) // 2], paths[len(paths) // 2 :]]
    slots = [
        (replace(adapters[n], modules={p: adapters[n].modules[p] for p in halves[0]}), [n])
        for n in "ab"
    ]
    new = replace(adapters["c"], modules={p: adapters["c"].modules[p] for p in halves[1]})
    size = plain(tmp_path / "pack", slots).nbytes
    pack = plain(tmp_path / "pack", slots, "20MB", size)
    found = add_adapter(pack, new, judge=judge)
    merged = found.pack.load("c")
    assert found.joined and verify(pack.path).nbytes <= size
    assert merged.modules.keys() == {*halves[0], *halves[1]} and 1 <= merged.rank < 4
    # One more would have been too much, and with its bytes there is one more.
    larger = merge_adapters([slots[0][0], new], rank=merged.rank + 1).uniform(mx.float16)
    slot = sum(found.pack.files_of(found.adapter).values())
    assert found.pack.nbytes - slot + larger.nbytes(LAYERS) > size
    more = plain(tmp_path / "pack", slots, "20MB", size - slot + larger.nbytes(LAYERS))
    assert add_adapter(more, new, judge=judge).pack.load("c").rank == merged.rank + 1


@pytest.mark.parametrize("judge", [None, Cheapest()])
def test_a_slot_without_room_is_passed_over_and_none_is_no_room(tmp_path, adapters, judge):
    """The first slot has one module of rank 1: with all modules it would be beyond the budget."""
    path, lora = next(iter(adapters["c"].modules.items()))
    most_alike = replace(adapters["c"], modules={path: LoRA(lora.a[:, :1], lora.b[:1])})
    slots = [(most_alike, ["a"]), (adapters["b"], ["b"])]
    size = plain(tmp_path / "pack", slots).nbytes
    pack = plain(tmp_path / "pack", slots, "20MB", size)
    found = add_adapter(pack, adapters["c"], judge=judge)
    assert found.adapter == "cluster-1" and found.pack.nbytes <= size
    assert judge is None or judge.asked == ["cluster-1"]
    pack = plain(tmp_path / "pack", slots[:1])
    before = hash_tree(pack.path)
    with pytest.raises(BudgetError, match="merged into one at rank 1; give more") as caught:
        add_adapter(pack, adapters["c"], judge=judge, budget=f"{pack.nbytes}B")
    least = re.search(r"at least ([\d,]+):", str(caught.value))[1].replace(",", "")
    assert hash_tree(pack.path) == before
    assert add_adapter(pack, adapters["c"], budget=f"{least}B").pack.nbytes == int(least)


def test_where_adapters_came_from_is_kept_as_long_as_they_are_in(pack, adapters):
    new = replace(adapters["c"], origin="org/c@1234")
    full = add_adapter(pack, new).pack
    assert full.manifest.origins == {"c": "org/c@1234"}
    # Still in the merge after its task has left; gone with an adapter of its own.
    assert remove_tasks(full, ["c"]).manifest.origins == {"c": "org/c@1234"}
    own = add_adapter(load_pack(pack.path), replace(new, name="d"), budget="3").pack
    assert own.manifest.origins.keys() == {"c", "d"} and remove_tasks(
        own, ["d"]
    ).manifest.origins.keys() == {"c"}


def test_an_origin_goes_with_its_merge_and_with_its_name(tmp_path, adapters):
    both = merge_adapters([adapters["a"], adapters["b"]]).uniform()
    slots = [replace(both, sources=("a", "b")), replace(adapters["c"], sources=("c",))]
    origins = {"a": "org/a@1", "b": "org/b@2", "c": "org/c@3"}
    path = tmp_path / "pack"
    pack = write_pack(path, slots, Manifest(budget="9", origins=origins, **ABOUT))
    left = remove_tasks(pack, ["b"])
    assert left.manifest.origins == origins
    # Another b, of this machine: not what is in the merge.
    local = replace(adapters["d"], name="b")
    assert add_adapter(left, local).pack.manifest.origins == {"a": "org/a@1", "c": "org/c@3"}
    path = tmp_path / "other"
    pack = write_pack(path, slots, Manifest(budget="9", origins=origins, **ABOUT))
    pack = remove_tasks(remove_tasks(pack, ["b"]), ["a"])
    assert pack.manifest.origins == {"c": "org/c@3"}


def test_removal(pack, adapters):
    merged = add_adapter(pack, adapters["c"]).pack
    place = merged.tasks["c"]
    other = "b" if merged.tasks["b"] == place else "a"
    left = remove_tasks(merged, [other])
    # The merge goes on to serve c; what is in it stays.
    assert left.load("c").digest == merged.load("c").digest
    assert other not in left.tasks and left.merged(place) == 2
    assert len(remove_tasks(left, ["c"]).adapters) == 1
    before = hash_tree(pack.path)
    with pytest.raises(PackError, match="no task 'x', 'y'"):
        remove_tasks(load_pack(pack.path), ["y", "x"])
    with pytest.raises(PackError, match="no task would be left"):
        remove_tasks(load_pack(pack.path), list(load_pack(pack.path).tasks))
    assert hash_tree(pack.path) == before


def test_a_pack_whose_budget_is_no_budget(tmp_path, adapters):
    """Who calls the library may name none: tasks can leave, an arrival asks for one."""
    pack = plain(tmp_path / "pack", [(adapters["a"], ["a"]), (adapters["b"], ["b"])], "-")
    with pytest.raises(BudgetError) as caught:
        add_adapter(pack, adapters["c"])
    (line,) = caught.value.problems
    assert line.startswith(f"{pack.path / 'manifest.json'}: budget: '-' is not readable")
    assert line.endswith("; give another with --budget")
    assert add_adapter(pack, adapters["c"], budget="3").adapter == "cluster-2"
    pack = plain(tmp_path / "pack", [(adapters["a"], ["a"]), (adapters["b"], ["b"])], "-")
    assert remove_tasks(pack, ["b"]).manifest.budget == "-"


@pytest.mark.parametrize(
    "name, budget, message",
    [("a", None, "task 'a' is there already"), ("new", "25%", "a share of adapters")],
)
def test_refusals(pack, adapters, name, budget, message):
    with pytest.raises(InputError, match=message):
        add_adapter(pack, replace(adapters["c"], name=name), budget=budget)


def test_a_budget_below_what_is_there(pack, adapters):
    """Merging the arrival leaves two, so a budget of one cannot be kept."""
    before = hash_tree(pack.path)
    with pytest.raises(BudgetError, match="budget: found 1, expected at least 2"):
        add_adapter(pack, adapters["c"], budget="1")
    assert hash_tree(pack.path) == before
    assert len(add_adapter(pack, adapters["c"], budget="2").pack.adapters) == 2


def test_a_pack_that_a_kill_left_aside_is_changed_all_the_same(pack):
    """Between the two renames of a change it is under another name, and only there."""
    pack.path.rename(pack.path.with_name(".pack.old"))
    with opened(pack.path) as found:
        assert list(remove_tasks(found, ["a"]).tasks) == ["b"]
    assert sorted(one.name for one in pack.path.parent.iterdir()) == [".lock", "pack"]


@pytest.mark.parametrize("name", ["NOTES.md", "plain/a.safetensors", ".git/HEAD"])
def test_a_pack_with_other_files_in_it_is_not_replaced(pack, name):
    """They would go with the old one; what programs leave there by themselves may."""
    for left in (".DS_Store", ".gitattributes", ".d2c-mlx.json", ".cache/x.lock", name):
        (pack.path / left).parent.mkdir(exist_ok=True)
        (pack.path / left).write_text("{}")
    top = name.split("/")[0]
    with pytest.raises(PackError, match=f"{re.escape(top)} in it is not the pack's; move it"):
        with opened(pack.path):
            pass
    assert (pack.path / name).exists()
    shutil.move(pack.path / top, pack.path.parent / "elsewhere")
    with opened(pack.path) as found:
        assert remove_tasks(found, [next(iter(found.tasks))]).path == pack.path


def test_a_pack_that_somebody_is_in_is_not_replaced(pack, monkeypatch):
    before = hash_tree(pack.path)
    monkeypatch.chdir(pack.path)
    with pytest.raises(PackError, match="is replaced as a whole, and you are in it"):
        with opened(Path()):
            pass
    assert hash_tree(pack.path) == before
