"""`--format gguf`: a plan of files that llama.cpp reads, within the budget to the byte."""

import json

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as read_blocks
from gguf.quants import quantize
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.loras import lora_of, truncated
from helpers.tiny import ALL

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import read_gguf as read_lora
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress.forms import Candidate, Forms, choose
from d2c_mlx.compress.gguf_form import gguf_store
from d2c_mlx.packs.export import export, verify
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import list_pack, remove_tasks
from d2c_mlx.pipeline import run
from d2c_mlx.utils.files import hash_file


@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("rank", [3, 32])
def test_a_planned_form_is_what_the_reader_gets(tmp_path, session, bits, most, rank):
    rng, config = np.random.default_rng(0), session.library.base.config
    adapter = Adapter("x", {m: lora_of(rng, ALL[m], 32, 1.0, mx.float32, 0.3) for m in ALL})
    modules = {m: ((min(rank, *ALL[m]), bits),) for m in ALL}
    form = gguf_store(adapter, modules).scaled(1.7)
    save_gguf(form, tmp_path / "x.gguf", config)
    again = read_lora(tmp_path / "x.gguf", ALL, config)
    _, deltas = read_gguf(tmp_path / "x.gguf")
    for module, lora in form.adapter().modules.items():
        n = modules[module][0][0]
        expected = in_llama_rows(module, lora.delta())
        np.testing.assert_allclose(deltas[gguf_name(module)], expected, rtol=1e-5, atol=1e-5)
        read = again.modules[module]
        assert mx.array_equal(lora.a, read.a) and mx.array_equal(lora.b, read.b)
        best = truncated(1.7 * adapter.modules[module].delta(), n)
        assert np.linalg.norm(lora.delta() - best) < most * np.linalg.norm(best)
    places = [(t.data_offset, int(t.n_bytes)) for t in GGUFReader(tmp_path / "x.gguf").tensors]
    assert all(0 <= b - a - size < 8 for (a, size), (b, _) in zip(places, places[1:]))
    kinds = {(a.kind.name, b.kind.name) for a, b in form.modules.values()}
    quantized = {8: "Q8_0", 4: "Q4_0"}[bits]
    assert (quantized, quantized if rank == 32 else "F16") in kinds


def test_error_compensation_beats_the_nearest_codes():
    """At the same bytes as `quantize` of the `gguf` package, of the same components."""
    rng, module, kind = np.random.default_rng(1), [*ALL][4], GGMLQuantizationType.Q4_0
    lora = lora_of(rng, (256, 96), 8, 1.0, mx.float32, 0.3)
    nearest = read_blocks(quantize(np.ascontiguousarray(np.array(lora.a).T), kind), kind)
    plain = np.linalg.norm(np.array(lora.b).T @ nearest - lora.delta())
    form = gguf_store(Adapter("x", {module: lora}), {module: ((8, 4),)})
    ours = form.adapter().modules[module].delta()
    assert np.linalg.norm(ours - lora.delta()) < 0.95 * plain


@pytest.fixture(scope="module")
def planned(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("gguf_run") / "run"
    return run(config.replace(format="gguf", output=str(output)), until="pack", quiet=True)


@pytest.mark.slow
def test_the_files_are_what_was_planned_and_measured(planned):
    pack, plan = load_pack(planned.path("pack")), planned.read("plan.json")
    library = planned.library
    files = sorted(pack.path.glob("*.gguf"))
    sizes = sorted(file.stat().st_size for file in files)
    assert pack.storage == "gguf" and {file.name for file in files} == set(pack.manifest.files)
    assert sum(sizes) == pack.nbytes <= int(0.6 * planned.capacity.total)
    assert sizes == sorted(unit["nbytes"] for unit in plan["units"])
    assert plan["units"] and sorted(pack.tasks) == library.names
    regrets = [
        library.by_teacher.regrets(pack.load(x), [i])[0] for i, x in enumerate(library.names)
    ]
    assert np.mean(regrets) == pytest.approx(plan["regret"], abs=1e-6)
    for file in files:
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
        assert kinds <= {"Q4_0", "Q8_0", "F16"} and kinds != {"F16"}


@pytest.mark.slow
def test_no_choice_exceeds_its_budget(planned, tmp_path):
    """Every form of the planner, as large in a file as it was counted; choices of many rooms."""
    capacity, offered, sizes = planned.capacity, [], []
    adapters, storage = planned.library.adapters, capacity.storage
    for room in (5_000, 80_000):
        forms = Forms(planned.library, capacity, room)
        for i, adapter in enumerate(adapters):
            offered += forms.ladder((i,), adapter)[0]
    for form in offered:
        storage.write(tmp_path, [storage.store(form.adapter, form.levels)])
        sizes.append((tmp_path / "0.gguf").stat().st_size)
        assert form.nbytes == sizes[-1] == storage.total([(form.adapter, form.levels)])
    assert len(sizes) >= 12
    bare = [Candidate((i,), 0, 1.0) for i in range(len(adapters))]
    for room in range(1_000, 2 * max(sizes), 5_000):
        chosen = choose([*bare, *offered], len(bare), room)
        assert sum(sizes[j - len(bare)] for j in chosen if j >= len(bare)) <= room


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:adapters")
def test_the_pack_is_exported_and_changed_like_others(planned, command, tmp_path):
    pack = load_pack(planned.path("pack"))
    for task, name in export(pack, "gguf", tmp_path / "gguf").items():
        stored = pack.tasks[task]
        assert (name is None) == (stored is None)
        assert name is None or hash_file(tmp_path / "gguf" / name) == hash_file(pack.path / stored)
    export(pack, "mlx", tmp_path / "mlx")
    export(pack, "peft", tmp_path / "peft")
    for path in (tmp_path / "peft").glob("*/adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] == pack.manifest.model
    assert verify(pack.path, "mlx-swift") == pack
    assert sum(row["nbytes"] for row in list_pack(pack)) == pack.nbytes
    code, _, err = command("add", pack.path, f"new={planned.config.adapters}/a", "--model",
                           planned.config.model)  # fmt: skip
    assert code == 2 and "planned as a whole" in err and len(err.splitlines()) == 1
    digest = pack.load("b").digest
    left = remove_tasks(load_pack(pack.path), ["a"])
    assert "a" not in left.tasks and left.nbytes <= pack.nbytes
    assert load_pack(left.path).load("b").digest == digest
