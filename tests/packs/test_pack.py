import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.tiny import LAYERS, SHAPES, TARGETS, peft_adapter

from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.packs.pack import PackInfo, load_pack
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import PackError

ALL = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(LAYERS) for name in SHAPES}
CONFIG = "cluster-0/adapter_config.json"
BASE = {"model": "m", "config_sha256": ""}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    sources = {"one": ("a", "c"), "two": ("b",)}
    return [
        replace(read_adapter(peft_adapter(root, name, seed=seed), ALL), sources=tasks)
        for seed, (name, tasks) in enumerate(sources.items())
    ]


def write(directory, adapters, max_bytes=None, budget="2"):
    return write_pack(
        directory,
        adapters,
        PackInfo(
            model="tiny/llama",
            config_hash="0" * 64,
            n_layers=LAYERS,
            budget=budget,
            max_bytes=max_bytes,
        ),
    )


@pytest.fixture
def pack(tmp_path, adapters):
    return write(tmp_path / "pack", adapters)


def refused(path):
    with pytest.raises(PackError) as caught:
        load_pack(path)
    return caught.value.problems


def edit(pack, **changes):
    path = pack.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_round_trip_changes_no_bit(pack, adapters):
    again = load_pack(pack.path)
    assert again == pack
    for adapter in adapters:
        for task in adapter.sources:
            loaded = again.load(task)
            assert loaded.digest == adapter.digest
            assert loaded.base == "tiny/llama"
            for path, lora in adapter.modules.items():
                assert loaded.modules[path].a.dtype == mx.float16
                assert mx.array_equal(loaded.modules[path].a, lora.a)
                assert mx.array_equal(loaded.modules[path].b, lora.b)
                assert loaded.modules[path].scale == lora.scale == 2.0


def test_manifest(pack):
    manifest = json.loads((pack.path / "manifest.json").read_text())
    # What most packs do not have is not written.
    said = {"format": "d2c-mlx-pack", "format_version": 1, **pack.manifest.model_dump()}
    assert said["base"].pop("weights_sha256") is None
    rare = [said.pop(name) for name in ("merged", "origins", "systems")]
    assert rare == [{}] * 3 and manifest == said
    files = {
        path.relative_to(pack.path).as_posix(): path.read_bytes()
        for path in pack.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert set(files) == {
        f"cluster-{k}/{name}"
        for k in (0, 1)
        for name in ("adapters.safetensors", "adapter_config.json")
    }
    assert manifest == {
        "format": "d2c-mlx-pack",
        "format_version": 1,
        "storage": "plain",
        "base": {"model": "tiny/llama", "config_sha256": "0" * 64},
        "budget": {"text": "2", "nbytes": None},
        "tasks": {"a": "cluster-0", "b": "cluster-1", "c": "cluster-0"},
        "files": {
            name: {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "nbytes": sum(map(len, files.values())),
    }
    assert list(manifest["tasks"]) == ["a", "b", "c"]


def test_nbytes_is_what_the_adapters_say(pack, adapters):
    assert pack.nbytes == sum(adapter.nbytes(LAYERS) for adapter in adapters)


def test_adapter_config_is_what_mlx_lm_reads(pack):
    config = json.loads((pack.adapter_path("b") / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == LAYERS
    assert config["lora_parameters"] == {
        "rank": 4, "scale": 2.0, "dropout": 0.0, "keys": sorted(TARGETS),
    }  # fmt: skip


def test_the_same_pack_twice_is_the_same_bytes(tmp_path, pack, adapters):
    again = write(tmp_path / "again", adapters)
    assert again.manifest == pack.manifest
    first, second = ((p.path / "manifest.json").read_bytes() for p in (pack, again))
    assert first == second


def test_unknown_task(pack):
    for call in (pack.load, pack.adapter_path):
        with pytest.raises(PackError, match="no task 'z'; it serves a, b, c"):
            call("z")


def test_exactly_the_budget_is_enough(tmp_path, pack, adapters):
    exact = write(tmp_path / "exact", adapters, max_bytes=pack.nbytes, budget="x")
    assert exact.manifest.budget.model_dump() == {"text": "x", "nbytes": pack.nbytes}


def test_over_budget_writes_nothing(tmp_path, pack, adapters):
    with pytest.raises(PackError) as caught:
        write(tmp_path / "over", adapters, max_bytes=pack.nbytes - 1)
    (line,) = caught.value.problems
    assert str(tmp_path / "over") in line
    assert f"{pack.nbytes:,}" in line and f"{pack.nbytes - 1:,}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_over_budget_keeps_the_old_pack(pack, adapters):
    with pytest.raises(PackError):
        write(pack.path, adapters, max_bytes=1)
    assert load_pack(pack.path) == pack


def test_tampering_with_one_bit(pack):
    file = pack.path / "cluster-0" / "adapters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (line,) = refused(pack.path)
    assert str(file) in line and "sha256" in line


def test_every_bad_file_is_listed(pack):
    missing = pack.path / "cluster-0" / "adapters.safetensors"
    missing.unlink()
    longer = pack.path / "cluster-1" / "adapter_config.json"
    longer.write_text(longer.read_text() + "\n")
    found = refused(pack.path)
    assert len(found) == 2
    assert any(str(missing) in line and "missing" in line for line in found)
    assert any(str(longer) in line and "differs" in line for line in found)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"format_version": 2}, "version 2"),
        ({"format_version": None}, "version None"),
        ({"format": "zip"}, "'zip'"),
    ],
)
def test_another_version(pack, change, found):
    edit(pack, **change)
    (line,) = refused(pack.path)
    assert "manifest.json" in line and found in line
    assert "expected 'd2c-mlx-pack' version 1" in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00"])
def test_a_manifest_that_is_no_json_object(pack, content):
    (pack.path / "manifest.json").write_bytes(content)
    (line,) = refused(pack.path)
    assert str(pack.path / "manifest.json") in line


@pytest.mark.parametrize("change", [{"files": None}, {"files": []}, {"tasks": None}])
def test_a_manifest_without_its_parts(pack, change):
    edit(pack, **change)
    (line,) = refused(pack.path)
    assert next(iter(change)) in line


def test_a_task_whose_adapter_the_manifest_does_not_verify(pack):
    edit(pack, tasks={"a": "../elsewhere"})
    with pytest.raises(PackError):
        load_pack(pack.path)


def test_a_task_that_leads_out_of_the_pack(tmp_path, pack):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    listed = {"nbytes": 0, "sha256": hashlib.sha256().hexdigest()}
    edit(pack, tasks={"a": ".."}, files={"../adapters.safetensors": listed})
    task, file = refused(pack.path)
    assert "points to '..'" in task and "'../adapters.safetensors' is no file of a pack" in file


def test_no_pack(tmp_path):
    (line,) = refused(tmp_path)
    assert str(tmp_path / "manifest.json") in line and "missing" in line


def test_pack_adapters_load_without_this_package_s_pack(pack, adapters):
    assert load_adapter(pack.path / "cluster-1").digest == adapters[1].digest


def listed(pack):
    """Files of the manifest as it is on disk."""
    return json.loads((pack.path / "manifest.json").read_text())["files"]


def without(pack, *names):
    """What the manifest lists, but for some files."""
    return {name: entry for name, entry in listed(pack).items() if name not in names}


@pytest.mark.parametrize(
    "change, found",
    [
        ({"nbytes": 5}, "nbytes: found 5, expected "),
        ({"nbytes": "5"}, "nbytes: found '5', expected "),
        ({"nbytes": None}, "nbytes: found missing, expected "),
        ({"nbytes": 1e3}, "nbytes: found 1000.0, expected "),
        ({"base": None}, "base.model is missing; base.config_sha256 is missing"),
        ({"base": {**BASE, "model": 3}}, "base.model is 3, expected a string"),
        ({"base": {**BASE, "config_sha256": []}}, "base.config_sha256 is [], expected a string"),
        ({"budget": None}, "budget.text is missing; budget.nbytes is missing"),
        ({"budget": {"text": 2, "nbytes": None}}, "budget.text is 2, expected a string"),
        ({"budget": {"text": "2", "nbytes": "x"}}, "budget.nbytes is 'x', expected a whole number"),
        ({"budget": {"text": "2", "nbytes": True}}, "budget.nbytes is True"),
        ({"budget": {"text": "2"}}, "budget.nbytes is missing"),
        ({"tasks": {}}, "tasks: found none, expected one or more"),
        ({"tasks": {"a\x1b[3m": "cluster-0"}}, "the name 'a\\x1b[3m' has characters that are not"),
        ({"tasks": {"a\u202e": "cluster-0"}}, "the name 'a\\u202e' has characters that are not"),
        ({"tasks": {"a": None}}, "points to None"),
    ],
)
def test_a_manifest_that_is_incomplete_or_false(pack, change, found):
    edit(pack, **change)
    (line,) = refused(pack.path)
    assert line.startswith(f"{pack.path / 'manifest.json'}: ") and found in line


def test_a_size_that_equals_and_is_none(pack):
    entry = {**listed(pack)[CONFIG], "nbytes": float(listed(pack)[CONFIG]["nbytes"])}
    edit(pack, files={**listed(pack), CONFIG: entry})
    (line,) = refused(pack.path)
    assert CONFIG in line and "differs" in line


def test_a_config_that_the_manifest_does_not_verify(pack):
    """What no hash covers could say anything: here another scale."""
    path = pack.path / CONFIG
    config = json.loads(path.read_text())
    config["lora_parameters"]["scale"] = 7.0
    path.write_text(json.dumps(config))
    left = without(pack, CONFIG)
    edit(pack, files=left, nbytes=sum(entry["nbytes"] for entry in left.values()))
    # Of both tasks that it serves.
    first, second = refused(pack.path)
    for line, task in ((first, "a"), (second, "c")):
        assert f"task '{task}' points to 'cluster-0'" in line and "adapter_config.json" in line


def test_all_problems_of_a_manifest_at_once(pack):
    edit(pack, base=None, budget={"text": 2}, tasks={}, nbytes="5", files=without(pack, CONFIG))
    fields = [line.split(": ")[1].split(" ")[0] for line in refused(pack.path)]
    assert fields == ["tasks", "nbytes", "base.model", "budget.text"]


@pytest.mark.parametrize("storage", [None, "plain"])
def test_what_was_written_before_still_loads(pack, storage):
    """Version 1 named no storage; who calls `write_pack` may have no budget to name."""
    edit(pack, storage=storage, budget={"text": "-", "nbytes": None})
    assert load_pack(pack.path).tasks == pack.tasks
