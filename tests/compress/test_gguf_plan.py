"""`--format gguf`: a plan of files that llama.cpp reads, within the budget to the byte."""

import json

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.tiny import library

from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress.forms import Candidate, Forms, choose
from d2c_mlx.compress.gguf_form import GgufStorage
from d2c_mlx.packs.export import export, verify
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import render_card
from d2c_mlx.packs.write import list_pack, remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import ConfigError, InputError, PackError
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
    assert pack.nbytes <= int(0.6 * session.capacity.total)
    assert sorted(file.stat().st_size for file in files) == sorted(
        unit["nbytes"] for unit in plan["units"]
    )
    assert plan["units"] and sorted(pack.tasks) == session.library.names


def test_no_choice_exceeds_its_budget(session, tmp_path):
    """Every form of the planner, as large in a file as it was counted; choices of many rooms."""
    capacity, offered, sizes = session.capacity, [], []
    for room in (5_000, 20_000, 80_000):
        forms = Forms(session.library, capacity, room)
        for i, adapter in enumerate(session.library.adapters):
            offered += forms.ladder((i,), adapter)[0]
    for form in offered:
        small = capacity.storage.store(form.adapter, form.levels, None)
        capacity.storage.write(tmp_path, [small])
        sizes.append((tmp_path / "0.gguf").stat().st_size)
        assert form.nbytes == sizes[-1] == capacity.storage.total([(form.adapter, form.levels)])
    assert len(sizes) >= 15
    bare = [Candidate((i,), 0, 1.0) for i in range(3)]
    for room in range(1_000, 2 * max(sizes), 5_000):
        chosen = choose([*bare, *offered], 3, room)
        assert sum(sizes[j - 3] for j in chosen if j >= 3) <= room


def test_sizes_are_exact_at_every_level(session, tmp_path):
    storage: GgufStorage = session.capacity.storage
    adapter = session.library.adapters[0]
    paths = sorted(adapter.modules)
    for n, bits, some in ((1, 4, paths), (2, 8, paths[:3]), (4, 4, paths[1:2])):
        levels = {path: ((n, bits),) for path in some}
        form = storage.store(adapter, levels, None)
        save_gguf(form, tmp_path / "x.gguf", session.library.base.config)
        assert (tmp_path / "x.gguf").stat().st_size == storage.nbytes(adapter.name, levels)


def test_what_was_measured_is_what_llama_cpp_gets(session):
    pack, plan = load_pack(session.path("pack")), session.read("plan.json")
    found = [
        float(session.library.by_teacher.regrets(pack.load(name), [i])[0])
        for i, name in enumerate(session.library.names)
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


@pytest.mark.filterwarnings("ignore:adapters")
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
    text = render_card(pack, "org/name", "org/base")
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

    refused("gguf", gguf={})
    refused("gguf", gguf=7)
    refused("gguf", gguf={**good["gguf"], "num_attention_heads": 0})
    refused("expected a .gguf among its files", tasks={"b": "manifest.json"})
    refused("expected a .gguf among its files", tasks={"b": 3})
    refused("1000000000", gguf={**good["gguf"], "num_hidden_layers": 10**9})


def test_options_and_bases_that_gguf_does_not_go_with(paths, tmp_path):
    with pytest.raises(ConfigError, match="format: found 'gguf', expected 'compact' unless"):
        config_of(paths, tmp_path / "run", budget="2")
    with pytest.raises(InputError, match="model_type is 'mamba'.* expected one of gemma2"):
        GgufStorage({}, {"model_type": "mamba"})
