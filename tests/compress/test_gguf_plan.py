"""`--format gguf`: a plan of files that llama.cpp reads, within the budget to the byte."""

import itertools
import json

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.tiny import library, peft_adapter
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress.allocate import Candidate, choose
from d2c_mlx.compress.candidates import FormMeter
from d2c_mlx.compress.storage import CompactStorage, GgufStorage, one_shape
from d2c_mlx.merge.merging import merge
from d2c_mlx.packs.export import export, verify
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import CardOptions, render_card
from d2c_mlx.packs.update import list_pack, remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import ConfigError, PackError
from d2c_mlx.utils.files import hash_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("gguf_plan"), ["a", "b", "c"])


def config_of(paths, output, **options):
    given = {"budget": "60%", "format": "gguf", "probe_examples": 3, "test_examples": 2, **options}
    return RunConfig(model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
                     output=str(output), **given)  # fmt: skip


@pytest.fixture(scope="module")
def session(paths, tmp_path_factory):
    config = config_of(paths, tmp_path_factory.mktemp("gguf_run") / "run")
    return run(config, until="pack", quiet=True)


def test_the_files_are_within_the_budget_and_as_large_as_was_planned(session):
    pack, plan = load_pack(session.path("pack")), session.read("plan.json")
    files = sorted(session.path("pack").glob("*.gguf"))
    assert pack.storage == "gguf" and {file.name for file in files} == set(pack.manifest.files)
    assert sum(file.stat().st_size for file in files) == pack.nbytes
    assert pack.nbytes <= int(0.6 * session.inputs.capacity.total)
    assert sorted(file.stat().st_size for file in files) == sorted(
        unit["nbytes"] for unit in plan["units"]
    )
    assert plan["units"] and sorted(pack.tasks) == session.inputs.names


def test_no_choice_exceeds_its_budget(session, tmp_path):
    """Every form of the planner, as large in a file as it was counted; choices of many rooms."""
    forms, storage = session.planner.forms, session.inputs.capacity.storage
    units = [((i,), adapter) for i, adapter in enumerate(session.adapters)]
    ladders = forms.ladders(units, "own", [5_000, 1_000_000])
    offered = [form for ladder in ladders for form in ladder]
    candidates = [forms.estimate(form, form.lost) for form in offered]
    sizes = []
    for k, (form, one) in enumerate(zip(offered, candidates)):
        storage.write(tmp_path, [storage.store(form.adapter, form.levels, None)])
        sizes.append((tmp_path / "0.gguf").stat().st_size)
        assert one.nbytes == sizes[k] == storage.total([one])
    assert len(sizes) >= 15
    bare = [Candidate((i,), "base", 0.0, {}, 0, 1.0) for i in range(3)]
    for room in range(1_000, 2 * max(sizes), 5_000):
        chosen = choose([*bare, *candidates], 3, room)
        assert sum(sizes[j - 3] for j in chosen if j >= 3) <= room


def test_sizes_are_exact_at_every_level(session, tmp_path):
    storage: GgufStorage = session.inputs.capacity.storage
    adapter = session.adapters[0]
    paths = sorted(adapter.modules)
    for n, bits, some in ((1, 4, paths), (2, 8, paths[:3]), (4, 4, paths[1:2])):
        levels = {path: ((n, bits),) for path in some}
        form = storage.store(adapter, levels, None)
        save_gguf(form, tmp_path / "x.gguf", session.inputs.base.config)
        assert (tmp_path / "x.gguf").stat().st_size == storage.nbytes(adapter.name, levels)


def test_what_was_measured_is_what_llama_cpp_gets(session):
    pack, plan = load_pack(session.path("pack")), session.read("plan.json")
    found = [
        float(session.library.by_teacher.regrets(pack.load(name), [i])[0])
        for i, name in enumerate(session.inputs.names)
    ]
    assert np.mean(found) == pytest.approx(plan["regret"], abs=1e-6)
    for task, name in pack.tasks.items():
        if name is None:
            continue
        metadata, deltas = read_gguf(pack.path / name)
        assert "adapter.lora.alpha" not in metadata
        kinds = {one.tensor_type.name for one in GGUFReader(pack.path / name).tensors}
        assert kinds <= {"Q4_0", "Q8_0", "F16"} and kinds != {"F16"}
        for path, lora in pack.load(task).modules.items():
            expected = in_llama_rows(path, lora.delta())
            np.testing.assert_allclose(deltas[gguf_name(path)], expected, rtol=2e-3, atol=1e-3)


def test_the_pack_is_exported_and_changed_like_others(session, command, tmp_path):
    pack = load_pack(session.path("pack"))
    tasks = export(pack, "gguf", tmp_path / "gguf")
    for task, name in tasks.items():
        stored = pack.tasks[task]
        assert (name is None) == (stored is None)
        assert name is None or hash_file(tmp_path / "gguf" / name) == hash_file(pack.path / stored)
    export(pack, "mlx", tmp_path / "mlx")
    assert verify(pack.path, "mlx-swift") == pack
    rows = list_pack(pack)
    assert sum(row["nbytes"] for row in rows) == pack.nbytes
    code, _, err = command("add", pack.path, f"new={session.config.adapters}/a", "--model",
                           session.config.model)  # fmt: skip
    assert code == 2 and "planned as a whole" in err and len(err.splitlines()) == 1
    digest = pack.load("b").digest
    left = remove_tasks(pack, ["a"])
    assert sorted(left.tasks) == ["b", "c"] and left.nbytes <= pack.nbytes
    assert load_pack(left.path).load("b").digest == digest


def test_its_card_and_its_exports_name_files_and_base(session, tmp_path):
    pack = load_pack(session.path("pack"))
    text = render_card(pack, "org/name", CardOptions("org/base"))
    assert f"`manifest.json` and the `.gguf` files, {pack.nbytes:,} bytes; the directories" in text
    export(pack, "peft", tmp_path / "peft")
    for path in (tmp_path / "peft").glob("*/adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] == pack.manifest.model


def test_a_manifest_that_does_not_say_where_tensors_belong(session, tmp_path):
    source = session.path("pack")
    (tmp_path / "pack").mkdir()
    for file in source.iterdir():
        (tmp_path / "pack" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "pack" / "manifest.json"
    good = json.loads(path.read_text())

    def refused(words, **changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(PackError) as caught:
            load_pack(tmp_path / "pack")
        assert any(words in line for line in caught.value.problems), caught.value.problems

    refused("gguf.modules is missing", gguf={})
    refused("gguf.model_type is missing", gguf=7)
    refused("gguf.num_attention_heads is 0", gguf={**good["gguf"], "num_attention_heads": 0})
    refused("expected a .gguf among its files", tasks={"b": "manifest.json"})
    refused("expected a .gguf among its files", tasks={"b": 3})
    refused("1000000000 blocks", gguf={**good["gguf"], "num_hidden_layers": 10**9})


def test_options_and_bases_that_gguf_does_not_go_with(paths, tmp_path):
    for options in ({"budget": "2"}, {"plan": "d2c"}):
        with pytest.raises(ConfigError, match="format: found 'gguf', expected 'compact' unless"):
            config_of(paths, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="same_shape: found True, expected False unless"):
        config_of(paths, tmp_path / "run", format="compact", same_shape=True, budget="2")
    with pytest.raises(ConfigError, match="model_type 'mamba'.* expected one of gemma2"):
        GgufStorage({}, {"model_type": "mamba"})


def shapes_in(pack):
    """Modules and sizes of every adapter of a pack."""
    return {
        tuple((path, one.a.shape, one.b.shape) for path, one in sorted(adapter.modules.items()))
        for name in pack.tasks if (adapter := pack.load(name))
    }  # fmt: skip


@pytest.mark.parametrize("form", ["gguf", "compact"])
def test_one_shape_for_all_adapters(paths, tmp_path, form):
    """Planned for, so nothing is padded: the same modules in every block, one rank, one type."""
    config = config_of(paths, tmp_path / "run", format=form, same_shape=True, budget="40%")
    found = run(config, until="pack", quiet=True)
    units, pack = found.read("plan.json")["units"], load_pack(found.path("pack"))
    assert units and pack.nbytes <= int(0.4 * found.inputs.capacity.total)
    assert all(unit["levels"] == units[0]["levels"] for unit in units)
    assert len({str(levels) for levels in units[0]["levels"].values()}) == 1
    assert verify(pack.path, "MNN") == pack
    assert len(shapes_in(pack)) == 1


def test_one_shape_is_the_best_of_its_bytes(session):
    """Against every rank, number of bits and set of kinds of modules."""
    storage = session.inputs.capacity.storage
    forms = FormMeter(session.library, session.inputs.capacity, same_shape=True)
    kinds = {}
    for path in forms._common:
        kinds.setdefault(path.split(".", 3)[3], []).append(path)
    for nbytes in (500, 1_500, 3_000, 8_000):
        best = 0.0
        for n, (bits, lost) in itertools.product(range(1, 5), storage.lost.items()):
            for k in range(1, len(kinds) + 1):
                for some in itertools.combinations(kinds, k):
                    chosen = [path for kind in some for path in kinds[kind]]
                    levels = dict.fromkeys(chosen, ((n, bits),))
                    kept = sum(forms._common[path][:n].sum() for path in chosen) * (1 - lost)
                    if storage.nbytes("", levels) <= nbytes:
                        best = max(best, kept)
        found = one_shape(storage, forms._common, nbytes)
        kept = sum(
            forms._common[path][:n].sum() * (1 - storage.lost[bits])
            for path, ((n, bits),) in found.items()
        )
        assert kept == pytest.approx(best) and storage.nbytes("", found) <= nbytes


def test_one_shape_where_a_module_was_not_trained(tmp_path):
    """It is left out of all adapters; with no module in common there is no shape."""
    paths = library(tmp_path, ["a", "b", "c"])
    file = paths.adapters / "a" / "adapter_model.safetensors"
    tensors, zero = load_file(file), "model.layers.1.self_attn.v_proj"
    key = f"base_model.model.{zero}.lora_B.weight"
    save_file({**tensors, key: 0 * tensors[key]}, file, metadata={"format": "pt"})
    config = config_of(paths, tmp_path / "run", format="compact", same_shape=True, budget="60%",
                       plan="auto").replace(tasks=None)  # fmt: skip
    found = run(config, until="pack", quiet=True)
    pack, levels = load_pack(found.path("pack")), found.read("plan.json")["units"][0]["levels"]
    assert None not in pack.tasks.values() and len(shapes_in(pack)) == 1
    assert zero not in levels and "model.layers.0.self_attn.v_proj" in levels

    peft_adapter(paths.adapters, "a", targets=("mlp.down_proj",))
    with pytest.raises(ConfigError, match="same_shape: no module is changed by all 3 adapters"):
        run(config, until="pack", quiet=True)


@pytest.mark.parametrize("form", ["gguf", "compact"])
def test_a_merge_of_a_lower_rank_is_of_one_shape_too(tmp_path, form):
    """Copies whose merges are nearly exact, though their rank is below the adapters'."""
    paths = library(tmp_path, list("abcd"))
    for name in "abcd":
        peft_adapter(paths.adapters, name, seed=0)
    config = config_of(paths, tmp_path / "run", format=form, same_shape=True, merge_rank=1)
    for thorough in (False, True):
        found = run(config.replace(thorough=thorough), until="pack", quiet=True)
        assert len(shapes_in(load_pack(found.path("pack")))) == 1
    units = [((0, 1), merge(found.library.by_teacher, (0, 1), found.config.merging).adapter)]
    (ladder,) = found.planner.forms.ladders(units, "merged", [found.inputs.capacity.room])
    assert {n for one in ladder for ((n, _),) in one.levels.values()} <= {1}


def test_one_shape_has_no_more_components_than_a_file_counts():
    """One byte counts those of a compact file at the same bits; a GGUF has no such limit."""
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    shapes = dict.fromkeys(paths, (2048, 2048))
    values = {path: np.linspace(1, 0.5, 300) for path in paths}
    gguf = GgufStorage(shapes, {"model_type": "llama", "num_hidden_layers": 2})
    most = {}
    for storage in (CompactStorage(["a"], None, shapes), gguf):
        found = one_shape(storage, values, 1e9)
        most[type(storage)] = {n for ((n, _),) in found.values()}
    assert most == {CompactStorage: {255}, GgufStorage: {300}}
