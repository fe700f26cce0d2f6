"""Packs that change, against dense oracles."""

import json
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import pack_of
from helpers.command import edit_config, edit_tensors
from helpers.loras import lora_of
from helpers.loras import plain as dense_levels
from helpers.tiny import ALL, TARGETS, library, tiny_model

from d2c_mlx import Adapter, LoRA, load_pack, read_adapter, verify
from d2c_mlx.compress.compact_file import COMPACT, compact_nbytes, index_of, read_compact
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.distill import module_gains
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.add import add_adapter, add_from_path
from d2c_mlx.packs.write import list_pack, opened, remove_tasks, write_pack
from d2c_mlx.utils.errors import BudgetError, InputError, InputWarning, PackError
from d2c_mlx.utils.files import hash_tree
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

NAMES = ("a", "b", "c", "d")
PATHS = [path for path in ALL if path.endswith(TARGETS)]


def full_rank(seed, name, rank=4):
    rng = np.random.default_rng(seed)
    loras = {path: lora_of(rng, ALL[path], rank, 2.0, mx.float16, 0.1) for path in PATHS}
    return Adapter(name, loras, "tiny/llama")


def first_component(adapter):
    """The adapter with one component, so that merges of four lose nothing."""
    first = mx.array([[1.0], [0], [0], [0]], mx.float16)
    loras = {path: replace(lora, b=lora.b * first) for path, lora in adapter.modules.items()}
    return replace(adapter, modules=loras)


WHOLE = {name: full_rank(seed, name) for seed, name in enumerate(NAMES)}
ADAPTERS = {name: first_component(adapter) for name, adapter in WHOLE.items()}


def deltas(adapter):
    return {path: lora.delta() for path, lora in adapter.modules.items()}


@pytest.fixture
def plain(tmp_path, about):
    """`plain(slots, budget, max_bytes)` writes a pack of (adapter, its tasks)."""

    def write(slots, budget="2", max_bytes=None, name="pack", **facts):
        adapters = [replace(adapter, sources=tuple(tasks)) for adapter, tasks in slots]
        facts = {"budget": budget, "max_bytes": max_bytes, **facts}
        return write_pack(tmp_path / name, adapters, about.model_copy(update=facts))

    return write


@pytest.fixture
def compact(tmp_path, about):
    def write(adapters, names="abc", limit=None, levels=((1, 4),)):
        stored = [compress(adapters[n], dict.fromkeys(PATHS, levels)) for n in names]
        serves = {name: i for i, name in enumerate(names)} | {"bare": None}
        facts = about.model_copy(update={"budget": "9MB", "max_bytes": limit})
        return write_pack(tmp_path / "pack", stored, facts, serves)

    return write


@pytest.fixture
def pack(plain):
    return plain([(ADAPTERS["a"], ["a"]), (ADAPTERS["b"], ["b"])])


def assert_close(adapter, expected, atol=1e-4):
    stored = deltas(adapter)
    assert stored.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(stored[path], value, atol=atol)


def test_an_arrival_gets_a_slot_of_its_own_while_there_is_one(pack):
    before = {name: hash_tree(pack.path / f"cluster-{name}") for name in "01"}
    arrival = add_adapter(pack, replace(ADAPTERS["c"], origin="org/c@1234"), budget="3")
    assert (arrival.adapter, arrival.joined) == ("cluster-2", ())
    now = verify(pack.path)
    assert now.tasks == {"a": "cluster-0", "b": "cluster-1", "c": "cluster-2"}
    assert now.load("c").digest == ADAPTERS["c"].uniform().digest
    assert {name: hash_tree(pack.path / f"cluster-{name}") for name in "01"} == before
    assert now.manifest.to_json()["budget"] == {"text": "3", "nbytes": None}
    assert "merged" not in json.loads((now.path / "manifest.json").read_text())
    assert now.manifest.origins == {"c": "org/c@1234"}
    assert remove_tasks(now, ["c"]).manifest.origins == {}


def test_a_full_pack_merges_into_the_slot_most_alike(pack):
    """Two thirds of the way to b; the similarity is that of dense dW."""
    loras = ADAPTERS["b"].modules.items()
    near = Adapter("near", {path: replace(lora, scale=2 * lora.scale) for path, lora in loras})
    new = replace(merge_adapters([ADAPTERS["d"], near], weights=[0.5, 0.5]), name="new")
    arrival = add_adapter(pack, new)
    assert (arrival.adapter, arrival.joined) == ("cluster-1", ("b",))
    b, c = deltas(ADAPTERS["b"]), deltas(new)
    x, y = (np.concatenate([dense[path].ravel() for path in b]) for dense in (b, c))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert arrival.similarity == pytest.approx(cosine, abs=1e-3)
    assert_close(arrival.pack.load("new"), {path: (b[path] + c[path]) / 2 for path in b})
    assert arrival.pack.load("b").digest == arrival.pack.load("new").digest
    assert arrival.pack.load("a").digest == pack.load("a").digest


def test_arrivals_one_by_one_are_the_mean_of_all(plain):
    """K-Merge's weights 1 - 1/n and 1/n: a running mean."""
    pack = plain([(ADAPTERS["a"], ["a"])], "1")
    for name in "bcd":
        pack = add_adapter(pack, ADAPTERS[name]).pack
    each = [deltas(ADAPTERS[name]) for name in NAMES]
    mean = {path: sum(dense[path] for dense in each) / 4 for path in PATHS}
    assert_close(pack.load("a"), mean, atol=2e-4)
    assert list_pack(pack)[0]["merged"] == 4
    # What left is still in it: the next one weighs a fifth.
    pack = remove_tasks(pack, ["b", "c"])
    assert pack.manifest.merged == {"cluster-0": 4}
    pack = add_adapter(pack, replace(ADAPTERS["b"], name="again")).pack
    fifth = {path: 0.8 * mean[path] + 0.2 * each[1][path] for path in PATHS}
    assert_close(pack.load("again"), fifth, atol=3e-4)


def test_a_slot_without_room_is_passed_over_and_none_is_no_room(plain):
    """The first slot has one module of rank 1: with all modules it would be beyond the budget."""
    path, lora = next(iter(ADAPTERS["c"].modules.items()))
    most_alike = replace(ADAPTERS["c"], modules={path: LoRA(lora.a[:, :1], lora.b[:1])})
    slots = [(most_alike, ["a"]), (ADAPTERS["b"], ["b"])]
    size = plain(slots).nbytes
    arrival = add_adapter(plain(slots, "20MB", size), ADAPTERS["c"])
    assert arrival.adapter == "cluster-1" and arrival.pack.nbytes <= size
    pack = plain(slots[:1])
    before = hash_tree(pack.path)
    with pytest.raises(BudgetError, match="nor merged into one of its adapters"):
        add_adapter(pack, ADAPTERS["c"], budget=f"{pack.nbytes}B")
    assert hash_tree(pack.path) == before


def test_an_origin_goes_with_its_merge_and_with_its_name(plain):
    both = merge_adapters([ADAPTERS["a"], ADAPTERS["b"]]).uniform()
    origins = {"a": "org/a@1", "b": "org/b@2", "c": "org/c@3"}
    pack = plain([(both, ["a", "b"]), (ADAPTERS["c"], ["c"])], "9", origins=origins)
    left = remove_tasks(pack, ["b"])
    assert left.manifest.origins == origins
    # Another b, of this machine: not what is in the merge.
    arrival = add_adapter(left, replace(ADAPTERS["d"], name="b"))
    assert arrival.pack.manifest.origins == {"a": "org/a@1", "c": "org/c@3"}
    assert remove_tasks(arrival.pack, ["a"]).manifest.origins == {"c": "org/c@3"}


def test_removal(pack):
    merged = add_adapter(pack, ADAPTERS["c"]).pack
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


def test_a_pack_of_gguf_files_only_shrinks(gguf, copy_of):
    path, digest = copy_of(gguf), gguf.load("two").digest
    with pytest.raises(PackError, match="planned as a whole"):
        add_adapter(load_pack(path), ADAPTERS["d"])
    left = remove_tasks(load_pack(path), ["one"])
    assert {*left.tasks} == {"none", "two"} and left.load("two").digest == digest
    assert sum(row["nbytes"] for row in list_pack(left)) == left.nbytes < gguf.nbytes


def test_what_cannot_be_added_leaves_the_pack_as_it_was(pack, plain, compact):
    def refused(pack, *cases):
        before = hash_tree(pack.path)
        for name, budget, words in cases:
            with pytest.raises(InputError, match=words):
                add_adapter(pack, replace(ADAPTERS["d"], name=name), budget=budget)
        assert hash_tree(pack.path) == before

    same, share = ("a", None, "task 'a' is there already"), ("x", "25%", "a share of adapters")
    # Merging the arrival leaves two.
    refused(pack, same, share, ("x", "1", "budget: found 1, and .* has 2 adapters"))
    # Who calls the library may name none: tasks can leave, an arrival asks for one.
    pack = plain([(ADAPTERS["a"], ["a"]), (ADAPTERS["b"], ["b"])], "-")
    refused(pack, ("c", None, "budget: .*'-'"))
    assert add_adapter(pack, ADAPTERS["c"], budget="3").adapter == "cluster-2"
    assert remove_tasks(load_pack(pack.path), ["b"]).manifest.budget == "3"
    few = ("d", "1500B", "give more, or remove a task")
    refused(compact(ADAPTERS), few, ("d", "3", "has 3 adapters"))


def test_a_pack_that_you_are_in_or_with_other_files_in_it_is_not_replaced(pack, monkeypatch):
    """They would go with the old one; what programs leave there by themselves may."""
    path = pack.path
    for name in (".DS_Store", ".gitattributes", ".d2c-mlx.json", ".cache/x.lock", ".git/HEAD"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    with pytest.raises(InputError, match=".git/HEAD in it is of no earlier output"):
        opened(path).__enter__()
    (path / ".git" / "HEAD").unlink()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="and you are in it"):
        patch.chdir(path)
        opened(Path()).__enter__()
    with opened(path) as verified:
        assert remove_tasks(verified, ["a"]).path == path


def test_a_compact_pack_makes_room_by_what_the_others_need_least(compact):
    size = compact(WHOLE, levels=[(1, 8), (3, 4)]).nbytes
    pack = compact(WHOLE, limit=size, levels=[(1, 8), (3, 4)])
    before = [read_compact(pack.path / COMPACT, i) for i in range(3)]
    arrival = add_adapter(pack, WHOLE["d"])
    now = verify(pack.path)
    assert now.nbytes <= size and now.tasks == {"a": 0, "b": 1, "c": 2, "d": 3, "bare": None}
    kept, gone = [], []
    for i, adapter in enumerate(before):
        after = read_compact(pack.path / COMPACT, i).modules
        every = [(path, level) for path, levels in adapter.modules.items() for level in levels]
        norms = [np.sum(dense_levels([level]).delta() ** 2.0) for _, level in every]
        for (path, old), norm in zip(every, norms):
            same = [level for level in after.get(path, ()) if level.bits == old.bits]
            (kept if same else gone).append((norm / sum(norms) / old.nbytes, old.rank))
            for new in same:
                for x, y in ((old.a, new.a), (old.b, new.b)):
                    assert np.array_equal(x.weight, y.weight) and np.array_equal(x.scales, y.scales)
    assert arrival.dropped == sum(rank for _, rank in gone) > 0
    assert max(gone)[0] <= min(kept)[0] * (1 + 1e-6)
    # No more than needed: a level takes 200 bytes at most.
    assert 0 < arrival.dropped_energy < 1 and size - now.nbytes < 200
    # d is stored in its share, and is d.
    stored, own = deltas(now.load("d")), deltas(WHOLE["d"])
    error = sum(np.sum((stored.get(path, 0) - own[path]) ** 2) for path in own)
    assert error < 0.6 * sum(np.sum(x**2) for x in own.values())


def test_removal_from_a_compact_pack(compact):
    pack = compact(ADAPTERS, limit=100_000)
    rest = {name: pack.load(name).digest for name in "ac"}
    left = remove_tasks(pack, ["b"])
    assert left.tasks == {"a": 0, "bare": None, "c": 1} and left.nbytes < pack.nbytes
    assert {name: left.load(name).digest for name in "ac"} == rest
    index = index_of([read_compact(left.path / COMPACT, i) for i in range(2)])
    assert compact_nbytes(index) == left.nbytes
    # An arrival in a pack that stores no adapter leaves room for the header.
    rng = np.random.default_rng(0)
    modules = {path: lora_of(rng, shape, 16) for path, shape in ALL.items()}
    for budget in (4_000, 16_000):
        pack = compact({}, "", limit=1_000)
        after = add_adapter(pack, Adapter("d", modules, "tiny"), budget=f"{budget}B").pack
        assert 0.7 * budget < after.nbytes <= budget and verify(after.path).tasks["d"] == 0


# Adapters that arrive from directories, with a model and probes: judged


@pytest.fixture
def whole(tmp_path):
    """A model, adapters, tasks, and a plain pack of two of the adapters."""
    paths = library(tmp_path, list(NAMES))
    base = Model(str(paths.model))
    adapters = {n: read_adapter(paths.adapters / n, base.module_shapes) for n in NAMES}
    stored = [replace(adapters[n], sources=(n,)) for n in "ab"]
    pack = pack_of(base, stored, tmp_path / "run" / "pack", model="m", budget="2")
    return paths, base, adapters, pack


def test_probes_decide_where_an_arrival_suffers_least(whole):
    """Every slot at every scale, tried here by brute force, and the walk over scales."""
    paths, base, adapters, pack = whole
    scorer = Scorer(Engine(base))
    probes = {n: base.encode(n, load_task(paths.tasks / n).probe) for n in NAMES}

    def losses(adapter, names):
        return scorer.losses([(adapter, [probes[n] for n in names])])[0]

    merges = [merge_adapters([adapters[member], adapters["c"]]) for member in "ab"]
    costs = {}
    for k, names in enumerate(("ac", "bc")):
        own = np.concatenate([losses(adapters[n].uniform(mx.float16), n) for n in names])
        gain = np.maximum(losses(None, names) - own, 0.05)
        for scale in COARSE_SCALES:
            regrets = (losses(scaled(merges[k], scale), names) - own) / gain
            costs[k, scale] = np.maximum(regrets, -1).sum()
    walks = [(k, line_search(lambda scale, k=k: costs[k, scale], COARSE_SCALES)[0]) for k in (0, 1)]
    k, scale = min(walks, key=costs.get)
    options = {"tasks": paths.tasks, "model": str(paths.model)}
    result = add_from_path(pack.path, str(paths.adapters / "c"), **options)
    assert result.adapter == f"cluster-{k}"
    expected, arrived = scaled(merges[k], scale).modules, result.pack.load("c").modules
    assert arrived.keys() == expected.keys()
    for path, lora in expected.items():
        np.testing.assert_allclose(arrived[path].delta(), lora.delta(), atol=1e-3)


def test_probes_choose_modules_and_scale_in_a_compact_pack(whole, tmp_path):
    """What weights take for most of an adapter does harm, and the probes see it."""
    paths, base, adapters, _ = whole
    probe = base.encode("b", load_task(paths.tasks / "b").probe)
    # Nothing else is asked for.
    for file in paths.tasks.rglob("test.jsonl"):
        file.unlink()
    harm = min(module_gains(base, adapters["b"], probe).items(), key=itemgetter(1))[0]
    key = f"base_model.model.{harm}.lora_B.weight"
    edit_tensors(paths.adapters / "b", lambda x: x.update({key: x[key] * np.float16(3)}))
    levels = dict(zip(adapters["a"].modules, ([(1, 2)], [(1, 2)], (), ())))
    losses, held = [], []
    for tasks in (None, paths.tasks):
        small = [compress(adapters["a"], levels)]
        pack = pack_of(base, small, tmp_path / "small", {"a": 0}, model="m", budget="9MB")
        options = {"tasks": tasks, "model": str(paths.model)}
        arrived = add_from_path(pack.path, str(paths.adapters / "b"), **options).pack.load("b")
        held.append(harm in arrived.modules)
        losses.append(Scorer(Engine(base)).losses([(arrived, [probe])])[0][0])
    assert held == [True, False] and losses[1] < losses[0] - 0.3


def test_what_cannot_arrive(whole, tmp_path):
    """Another base model by name is a warning; a name in another precision is no other."""
    paths, _, _, pack = whole
    before, model, arrival = hash_tree(pack.path), str(paths.model), str(paths.adapters / "c")
    other = str(tiny_model(tmp_path / "other", rope_theta=20000.0))
    for adapter, options, words in (
        (arrival, {}, "the pack is for 'm'"),
        (f"x={arrival}", {"tasks": paths.tasks, "model": model}, "tasks/x: missing"),
        ("nope", {"model": model}, "nope: no such directory .* ADAPTER is an adapter"),
        (arrival, {"model": other}, "is not the config of 'm'"),
    ):
        pytest.raises(InputError, add_from_path, pack.path, adapter, **options).match(words)
    assert hash_tree(pack.path) == before
    edit_config(paths.adapters / "c", base_model_name_or_path="unsloth/Llama-bnb-4bit")
    add_from_path(pack.path, f"same={arrival}", model=model)
    edit_config(paths.adapters / "c", base_model_name_or_path="tiny/llama-chat")
    with pytest.warns(InputWarning, match=r"'tiny/llama-chat' \(other\), expected 'm' or 'tiny/"):
        add_from_path(pack.path, f"other={arrival}", model=model)
