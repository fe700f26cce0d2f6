"""Atomic writes, what a kill leaves behind, locks, and reads of regular files only."""

import json
import os
from pathlib import Path

import pytest

from d2c_mlx.utils import files
from d2c_mlx.utils.errors import ConfigError, D2CError


def entries(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "a" / "out"
    for name in ("old/x", "new/y"):
        before = entries(tmp_path)
        with files.write_dir(target) as directory:
            (directory / name).parent.mkdir()
            (directory / name).write_text(name)
            assert entries(target) == [p.removeprefix("a/out/") for p in before if "out/" in p]
            assert directory.parent == target.parent
            with files.write_dir(tmp_path / "b") as first:
                (first / "a").write_text("first")
                # Another process writes the same directory; the last one stays.
                with files.write_dir(tmp_path / "b") as second:
                    (second / "b").write_text("second")
                assert entries(tmp_path / "b") == ["b"]
    assert entries(tmp_path) == ["a", "a/out", "a/out/new", "a/out/new/y", "b", "b/a"]


@pytest.mark.parametrize("where", ["block", "ready", "rename"])
def test_an_error_keeps_the_old_directory_and_leaves_nothing(tmp_path, monkeypatch, where):
    def fail(*args):
        raise KeyboardInterrupt

    files.write_text(tmp_path / "out" / "old", "old")
    if where == "rename":
        monkeypatch.setattr(files, "_rename", fail)
    for name in ("out", "none"):
        with pytest.raises(KeyboardInterrupt):
            with files.write_dir(tmp_path / name, fail if where == "ready" else None) as directory:
                (directory / "old").write_text("new")
                if where == "block":
                    fail()
    assert entries(tmp_path) == ["out", "out/old"]
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_what_a_kill_left_is_removed_and_what_is_somebody_s_is_not(tmp_path):
    for name in ("kept/mine", ".out.0123abcd.tmp/x", ".out.mine.tmp/x", ".out.old"):
        files.write_text(tmp_path / name, "mine")
    (tmp_path / ".out.89abcdef.tmp").symlink_to("kept")
    left = [".out.mine.tmp", ".out.mine.tmp/x", "kept", "kept/mine", "out", "out/x"]
    for _ in range(2):
        with files.write_dir(tmp_path / "out") as directory:
            (directory / "x").write_text("x")
    assert entries(tmp_path) == left
    # The old directory, which a kill left aside, is put back.
    os.replace(tmp_path / "out", tmp_path / ".out.old")
    files.restore_dir(tmp_path / "out")
    assert entries(tmp_path) == left
    (tmp_path / ".out.old").symlink_to("out")
    files.restore_dir(tmp_path / "out")
    assert (tmp_path / ".out.old").is_symlink()


def test_links_and_other_names_of_a_directory(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    monkeypatch.chdir(tmp_path)
    for name in ("link", "dangling", "sub/../real/."):
        with files.write_dir(Path(name)) as directory:
            (directory / "x").write_text(name)
    assert entries(tmp_path) == ["dangling", "link", "made", "made/x", "real", "real/x"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link/x").read_text()[0] == "s"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to-file").symlink_to("file")
    for name in ("file", "to-file", "/"):
        with pytest.raises(ConfigError, match="is no directory that can be replaced"):
            with files.write_dir(Path(name)):
                raise AssertionError("the body ran")
    assert (tmp_path / "file").read_text() == "mine"


def test_texts_and_json_are_replaced_and_leave_no_temporary(tmp_path, monkeypatch):
    value, path = {"b": [1, 2.5, None], "a": "ä"}, tmp_path / "sub" / "x.json"
    for content in ({}, value):
        files.write_json(path, content)
    pytest.raises(ValueError, files.write_json, path, {"deep": [float("nan")]})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value and "ä" in text and text.endswith("}\n")
    # Even a temporary name that is guessed leads nowhere.
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "01" * n)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".y.01010101.tmp").symlink_to("mine")
    pytest.raises(FileExistsError, files.write_json, tmp_path / "y", [1])
    assert (tmp_path / "mine").read_text() == "mine"
    assert entries(tmp_path) == ["mine", "sub", "sub/x.json"]


def test_hashes_change_with_names_and_content_alone(tmp_path):
    first, finder = {"x": "1", "sub/y": "2"}, {"sub/.DS_Store": "1", ".hidden/z": "1"}
    changes = [{}, {"sub/y": "3"}, {"z": ""}, finder]  # a Mac's Finder leaves such files
    trees = [{"x": "1", "y": "2"}, *(first | change for change in changes)]
    for i, tree in enumerate(trees):
        for name, content in tree.items():
            files.write_text(tmp_path / str(i) / name, content)
    hashes = [files.hash_tree(tmp_path / str(i)) for i in range(len(trees))]
    assert len({*hashes}) == len(trees) - 1 and hashes[1] == hashes[-1]
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.hash_tree(tmp_path / "abc") == files.hash_file(tmp_path / "abc") == expected
    assert files.copy_file(tmp_path / "abc", tmp_path / "copy") == expected
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (files.hash_file, files.read_text, files.open_file):
            pytest.raises(OSError, read, tmp_path / name).match("is no regular file")
    pytest.raises(IsADirectoryError, files.open_file, tmp_path)
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(3 << 30)
    pytest.raises(OSError, files.read_text, tmp_path / "sparse").match("more than 67,108,864 bytes")
    (tmp_path / "lines").write_bytes("ä\r\nb\rc\n".encode())
    assert files.read_text(tmp_path / "lines") == (tmp_path / "lines").read_text("utf-8")


FILES = {
    "link": lambda lock: lock.symlink_to("mine"),
    "dangling": lambda lock: lock.symlink_to("made"),
    "hard link": lambda lock: lock.hardlink_to(lock.parent / "mine"),
    "pipe": os.mkfifo,
    "text": lambda lock: lock.write_text("mine"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_lock_file_that_is_not_ours_is_left_alone(tmp_path, kind):
    mine, lock = tmp_path / "mine", tmp_path / ".lock"
    mine.write_text("mine" if kind != "hard link" else "")
    FILES[kind](lock)
    before = mine.read_text(), lock.lstat()
    with pytest.raises(D2CError, match=r"/\.lock: is no lock file of d2c-mlx"):
        files.locked(tmp_path).__enter__()
    assert (mine.read_text(), lock.lstat()) == before and not (tmp_path / "made").exists()


def test_readers_share_a_directory_and_a_writer_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr("d2c_mlx.utils.files._WAIT_SECONDS", 0)
    assert not files.is_held(tmp_path)
    # A lock is of an open file, so one process may stand for several.
    with files.held(tmp_path, shared=True), files.held(tmp_path, shared=True):
        assert files.is_held(tmp_path)
        writer = files.held(tmp_path)
        pytest.raises(D2CError, writer.__enter__).match("another process has been at work")
    with files.held(tmp_path), files.held(tmp_path / "none"):
        assert not files.is_held(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
