"""A pack that another process replaces while it is read, and commands that share an output."""

import itertools
import os

import pytest
from helpers.exported import adapter_of

from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.packs.push import push
from d2c_mlx.packs.write import list_pack, opened, write_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_tree


@pytest.fixture(params=["plain", "compact"])
def make(request, about):
    """Writes a pack of three adapters, others for another seed."""

    def write(path, seed):
        adapters = [adapter_of(name, seed=seed + i) for i, name in enumerate("abc")]
        if request.param == "plain":
            return write_pack(path, adapters, about)
        small = [compress(one, dict.fromkeys(one.modules, [(3, 4)])) for one in adapters]
        return write_pack(path, small, about, {name: i for i, name in enumerate("abc")})

    return write


def test_a_pack_that_was_replaced_is_not_taken_for_the_one_that_was_verified(make, tmp_path):
    """Each file was read from whatever pack was there by then; two packs were mixed."""
    stale = make(tmp_path / "pack", 0)
    export(stale, "mlx", tmp_path / "out")
    before = hash_tree(tmp_path / "out")
    make(tmp_path / "pack", 10)
    for use in (
        lambda: export(stale, "mlx", tmp_path / "out"),
        lambda: export(stale, "peft", tmp_path / "peft"),
        lambda: push(stale, "org/name", output=tmp_path / "out2"),
        lambda: stale.load("a"),
    ):
        with pytest.raises(PackError, match="was replaced or changed while it was read"):
            use()
    assert hash_tree(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "pack"}
    assert not (tmp_path / "peft").exists() and not (tmp_path / "out2").exists()


def test_bytes_that_change_under_the_same_name_and_time_show(make, tmp_path):
    pack = make(tmp_path / "pack", 0)
    (path, *_) = sorted((tmp_path / "pack").rglob("*.safetensors"))
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    names = [path.relative_to(pack.path).as_posix()]
    for use in (lambda: pack.load("a"), lambda: pack.copy_all(names, tmp_path / "copy")):
        with pytest.raises(PackError, match="was replaced or changed"):
            use()


def test_a_pack_that_a_kill_left_aside_is_read(make, tmp_path, command):
    """Between the two renames of a change it is under another name, and only there."""
    pack = make(tmp_path / "pack", 0)
    before = hash_tree(pack.path)
    for read in (
        lambda: list_pack(load_pack(pack.path)),
        lambda: command("verify", pack.path),
        lambda: opened(pack.path).__enter__(),
    ):
        pack.path.rename(tmp_path / ".pack.old")
        assert read()
        assert hash_tree(pack.path) == before and not (tmp_path / ".pack.old").exists()
    (tmp_path / "link").symlink_to("pack")
    pack.path.rename(tmp_path / ".pack.old")
    assert load_pack(tmp_path / "link").tasks == pack.tasks


def test_an_output_that_became_another_s_meanwhile_is_not_replaced(make, tmp_path, monkeypatch):
    pack = make(tmp_path / "pack", 0)
    copied, original = itertools.count(), Pack.copy_all

    def write(self, names, target):
        if not next(copied):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")
        return original(self, names, target)

    monkeypatch.setattr(Pack, "copy_all", write)
    with pytest.raises(Exception, match="mine in it is of no earlier output"):
        push(pack, "org/name", output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
