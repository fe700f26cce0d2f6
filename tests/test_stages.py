"""Records and packs of a run directory that are damaged, or not of the run."""

import json
import shutil

import pytest
from test_run import _started, config  # noqa: F401  a fixture

from d2c_mlx.errors import PackError
from d2c_mlx.files import hash_tree
from d2c_mlx.pipeline import run


def test_files_of_the_user_and_packs_of_other_versions_are_no_damaged_packs(config):  # noqa: F811
    output = run(config, "merge", quiet=True).output
    pack = output / "pack"

    def refused():
        before = hash_tree(pack)
        with pytest.raises(PackError, match="pack: is not the pack that this run made"):
            run(config, "pack", quiet=True)
        assert hash_tree(pack) == before

    def manifest(**changes):
        path = pack / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    pack.mkdir()
    (pack / ".DS_Store").write_bytes(b"of a Mac")
    run(config, "pack", quiet=True)
    made = hash_tree(pack)
    for change in ({"format_version": 9}, {"format": "another"}, {"storage": "other"}):
        manifest(**change)
        refused()
        shutil.rmtree(pack)
        assert hash_tree(run(config, "pack", quiet=True).path("pack")) == made
    for name in (
        "thesis.txt",
        "cluster-0/notes.txt",
        "router.safetensors",
        "mine/adapters.safetensors",
    ):
        (pack / name).parent.mkdir(exist_ok=True)
        (pack / name).write_text("mine")
        refused()
        (pack / "cluster-1" / "adapters.safetensors").write_bytes(b"damaged")
        refused()
        (pack / name).unlink()
        assert hash_tree(run(config, "pack", quiet=True).path("pack")) == made
    manifest(nbytes=1)
    assert hash_tree(run(config, "pack", quiet=True).path("pack")) == made
    shutil.rmtree(pack)
    pack.mkdir()
    (pack / "thesis.txt").write_text("mine")
    refused()


@pytest.mark.parametrize("content", ["", '{"inputs": "a', "[]", '{"inputs": null}', "\xff"])
def test_a_record_that_cannot_be_read_is_of_no_stage(config, content):  # noqa: F811
    output = run(config, "pack", quiet=True).output
    first, made = _started(output), hash_tree(output / "pack")
    damaged = content.encode("latin-1")
    (output / ".stages" / "probe.json").write_bytes(damaged)
    run(config, "pack", quiet=True)
    assert {name for name, time in _started(output).items() if time != first[name]} == {"probe"}
    # Of a pack nothing tells then who made it.
    (output / ".stages" / "pack.json").write_bytes(damaged)
    run(config, "merge", quiet=True)
    with pytest.raises(PackError, match="is not the pack that this run made"):
        run(config, "pack", quiet=True)
    shutil.rmtree(output / "pack")
    assert hash_tree(run(config, "pack", quiet=True).path("pack")) == made
