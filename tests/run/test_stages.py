"""Records and packs of a run directory that are damaged, or not of the run."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import stages_started

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.serve.router import route_prompts
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_tree


@pytest.mark.slow
def test_files_of_the_user_and_packs_of_other_makers_are_kept(config):
    output = run(config, "merge", quiet=True).output
    pack = output / "pack"
    pack.mkdir()
    (pack / ".DS_Store").write_bytes(b"of a Mac")
    run(config, "pack", quiet=True)
    first = hash_tree(pack)
    for name in ("thesis.txt", "cluster-0/notes.txt", "router.safetensors"):
        (pack / name).write_text("mine")
        before = hash_tree(pack)
        with pytest.raises(PackError, match="pack: is not the pack that this run made"):
            run(config, "pack", quiet=True)
        assert hash_tree(pack) == before
        (pack / name).unlink()
    assert hash_tree(run(config, "pack", quiet=True).path("pack")) == first


@pytest.mark.slow
def test_a_router_leaves_the_pack_the_one_of_its_run(config, monkeypatch):
    config = config.replace(budget="2")
    output = run(config, quiet=True).output
    pack, started = output / "pack", stages_started(output)
    # Fitted anew as often as one likes, the pack given as a path relative to its run or not.
    for directory, path in ((output, "pack"), (output.parent, "run/pack")):
        monkeypatch.chdir(directory)
        assert (
            route_prompts(Path(path), [], tasks=Path(config.tasks), n_probe=3, model=config.model)
            == []
        )
    routed, nbytes = hash_tree(pack), load_pack(pack).nbytes
    assert (pack / "router.safetensors").exists()
    run(config, quiet=True)
    assert hash_tree(pack) == routed
    again = {name for name, time in stages_started(output).items() if time != started[name]}
    assert again == {"pack", "bench", "report"}
    assert json.loads((output / "bench.json").read_text())["methods"]["pack"]["nbytes"] == nbytes
    # One that is not of `route`, and other adapters: see above and test_overlap_owned.
    (pack / "router.safetensors").write_bytes(b"mine")
    with pytest.raises(PackError, match="is not the pack that this run made"):
        run(config, "pack", quiet=True)
    # No run is beside a copy: nothing is recorded there.
    shutil.rmtree(pack)
    other = shutil.copytree(run(config, "pack", quiet=True).path("pack"), output / "copy")
    route_prompts(other, [], tasks=Path(config.tasks), n_probe=3, model=config.model)
    run(config, "pack", quiet=True)
    assert not (pack / "router.safetensors").exists()


@pytest.mark.parametrize("content", ["", '{"inputs": "a', "[]", '{"inputs": null}', "\xff"])
def test_a_record_that_cannot_be_read_is_of_no_stage(config, content):
    output = run(config, "pack", quiet=True).output
    first, made = stages_started(output), hash_tree(output / "pack")
    damaged = content.encode("latin-1")
    (output / ".stages" / "probe.json").write_bytes(damaged)
    run(config, "pack", quiet=True)
    assert {name for name, time in stages_started(output).items() if time != first[name]} == {
        "probe"
    }
    # Of a pack nothing tells then who made it.
    (output / ".stages" / "pack.json").write_bytes(damaged)
    run(config, "merge", quiet=True)
    with pytest.raises(PackError, match="is not the pack that this run made"):
        run(config, "pack", quiet=True)
    shutil.rmtree(output / "pack")
    assert hash_tree(run(config, "pack", quiet=True).path("pack")) == made
