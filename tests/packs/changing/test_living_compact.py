"""Compact packs that change: what makes room, what stays bit for bit, and what is refused."""

import numpy as np
import pytest
from helpers.changing import ABOUT, deltas, full_rank
from helpers.loras import lora_of, plain
from helpers.tiny import ALL

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import index_of, read_compact
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.add import add_adapter
from d2c_mlx.packs.export import verify
from d2c_mlx.packs.manifest import COMPACT, Manifest
from d2c_mlx.packs.update import remove_tasks
from d2c_mlx.packs.write import write_compact_pack
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.files import hash_tree


def compact(directory, adapters, names="abc", limit=None, levels=((1, 4),)):
    stored = [compress(adapters[n], dict.fromkeys(adapters[n].modules, levels)) for n in names]
    serves = {name: i for i, name in enumerate(names)} | {"bare": None}
    return write_compact_pack(
        directory, stored, serves, Manifest(budget="9MB", max_bytes=limit, **ABOUT)
    )


def test_a_compact_pack_makes_room_by_what_the_others_need_least(tmp_path):
    adapters = full_rank(tmp_path)
    size = compact(tmp_path / "pack", adapters, levels=[(1, 8), (3, 4)]).nbytes
    pack = compact(tmp_path / "pack", adapters, limit=size, levels=[(1, 8), (3, 4)])
    before = {name: read_compact(pack.path / COMPACT, i) for i, name in enumerate("abc")}
    found = add_adapter(pack, adapters["d"])
    now = verify(pack.path)
    assert now.nbytes <= size and now.tasks == {"a": 0, "b": 1, "c": 2, "d": 3, "bare": None}
    kept, gone = [], []
    for i, name in enumerate("abc"):
        after = read_compact(pack.path / COMPACT, i)
        every = [(path, one) for path, levels in before[name].modules.items() for one in levels]
        norms = [np.sum(plain([one]).delta() ** 2.0) for _, one in every]
        for (path, old), norm in zip(every, norms):
            share = norm / sum(norms) / old.nbytes
            same = [one for one in after.modules.get(path, ()) if one.bits == old.bits]
            (kept if same else gone).append((share, old.rank))
            for x, y in ((x, y) for new in same for x, y in ((old.a, new.a), (old.b, new.b))):
                assert np.array_equal(x.weight, y.weight) and np.array_equal(x.scales, y.scales)
    assert found.dropped == sum(rank for _, rank in gone) > 0
    assert max(gone)[0] <= min(kept)[0] * (1 + 1e-6)
    # No more than needed: a level takes 200 bytes at most.
    assert 0 < found.dropped_energy < 1 and size - now.nbytes < 200
    # d is stored in its share, and is d.
    error = deltas(now.load("d"))
    own = deltas(adapters["d"])
    rest = sum(np.sum((error.get(p, 0) - own[p]) ** 2) for p in own)
    assert rest < 0.6 * sum(np.sum(x**2) for x in own.values())


def test_with_room_nothing_is_dropped(tmp_path, adapters):
    pack = compact(tmp_path / "pack", adapters, "ab", limit=100_000)
    before = [pack.load(name).digest for name in "ab"]
    found = add_adapter(pack, adapters["c"])
    assert found.dropped == 0 and [found.pack.load(name).digest for name in "ab"] == before
    assert found.pack.load("bare") is None


@pytest.mark.parametrize("budget", [4_000, 8_000, 16_000])
def test_an_arrival_in_a_pack_that_stores_no_adapter_leaves_room_for_the_header(tmp_path, budget):
    pack = compact(tmp_path / "pack", {}, "", limit=1_000)
    rng = np.random.default_rng(0)
    modules = {path: lora_of(rng, shape, 16) for path, shape in ALL.items()}
    found = add_adapter(pack, Adapter("d", modules, "tiny"), budget=f"{budget}B")
    assert 0.7 * budget < found.pack.nbytes <= budget and verify(found.pack.path).tasks["d"] == 0


def test_removal_from_a_compact_pack(tmp_path, adapters):
    pack = compact(tmp_path / "pack", adapters, limit=100_000)
    rest = {name: pack.load(name).digest for name in "ac"}
    left = remove_tasks(pack, ["b"])
    assert left.tasks == {"a": 0, "bare": None, "c": 1} and left.nbytes < pack.nbytes
    assert {name: left.load(name).digest for name in "ac"} == rest
    index = index_of([read_compact(left.path / COMPACT, i) for i in range(2)])
    assert compact_nbytes(index) == left.nbytes


def test_no_room_leaves_the_pack_as_it_was(tmp_path, adapters):
    pack = compact(tmp_path / "pack", adapters)
    before = hash_tree(pack.path)
    with pytest.raises(BudgetError, match="give more, or remove a task"):
        add_adapter(pack, adapters["d"], budget="1500B")
    with pytest.raises(BudgetError, match="3 adapters are in"):
        add_adapter(pack, adapters["d"], budget="3")
    assert hash_tree(pack.path) == before
