import json
import os
from pathlib import Path

import pytest

from d2c_mlx.utils import files
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import fingerprint, hash_file, hash_tree, write_dir, write_json, write_text


def entries(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_write_dir_makes_the_directory_and_its_parents(tmp_path):
    with write_dir(tmp_path / "a" / "b") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert entries(tmp_path) == ["a", "a/b", "a/b/sub", "a/b/sub/x"]


def test_write_dir_replaces_the_whole_directory(tmp_path):
    target = tmp_path / "out"
    with write_dir(target) as directory:
        (directory / "old").write_text("old")
    with write_dir(target) as directory:
        (directory / "new").write_text("new")
        assert entries(target) == ["old"]
        assert directory.parent == target.parent
    assert entries(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_write_dir_keeps_the_old_content_on_an_exception(tmp_path, error):
    target = tmp_path / "out"
    with write_dir(target) as directory:
        (directory / "old").write_text("old")
    with pytest.raises(error), write_dir(target) as directory:
        (directory / "old").write_text("new")
        raise error
    assert entries(tmp_path) == ["out", "out/old"]
    assert (target / "old").read_text() == "old"


def test_write_dir_leaves_nothing_on_an_exception(tmp_path):
    with pytest.raises(ValueError), write_dir(tmp_path / "out") as directory:
        (directory / "x").write_text("x")
        raise ValueError
    assert entries(tmp_path) == []


def test_write_dir_starts_empty_after_a_kill(tmp_path):
    for name in (".out.0123abcd.tmp", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("over")
    with write_dir(tmp_path / "out") as directory:
        (directory / "x").write_text("x")
    assert entries(tmp_path) == ["out", "out/x"]


def test_two_that_write_one_directory_do_not_touch_each_other_s(tmp_path):
    """One name for both let the second empty what the first had written so far."""
    with write_dir(tmp_path / "out") as first:
        (first / "a").write_text("first")
        with write_dir(tmp_path / "out") as second:
            (second / "b").write_text("second")
        assert entries(tmp_path / "out") == ["b"]
        (first / "c").write_text("first")
    assert entries(tmp_path) == ["out", "out/a", "out/c"]


def test_write_text_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    write_text(path, "eins")
    write_text(path, "zwei: ä")
    assert path.read_bytes() == "zwei: ä".encode()
    assert entries(tmp_path) == ["sub", "sub/file.txt"]


def test_write_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": "ä"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "ä" in text and text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_write_json_refuses_what_is_no_json(tmp_path, value):
    path = tmp_path / "x.json"
    write_json(path, [1.0])
    with pytest.raises(ValueError):
        write_json(path, {"deep": [value]})
    assert json.loads(path.read_text()) == [1.0]
    assert entries(tmp_path) == ["x.json"]


def test_hash_tree_changes_with_name_and_content(tmp_path):
    def tree(name, files):
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return hash_tree(tmp_path / name)

    first = tree("a", {"x": "1", "sub/y": "2"})
    assert tree("same", {"sub/y": "2", "x": "1"}) == first
    others = [
        tree("content", {"x": "1", "sub/y": "3"}),
        tree("name", {"x": "1", "sub/z": "2"}),
        tree("folder", {"x": "1", "y": "2"}),
        tree("swapped", {"x": "2", "sub/y": "1"}),
        tree("fewer", {"x": "1"}),
        tree("more", {"x": "1", "sub/y": "2", "z": ""}),
    ]
    assert len({first, *others}) == 1 + len(others)
    # What a Mac's Finder leaves where somebody looked.
    assert tree("same", {".DS_Store": "1", "sub/.DS_Store": "2", ".hidden/z": "3"}) == first


def test_hash_tree_of_a_file_is_the_hash_of_its_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_tree(tmp_path / "x") == hash_file(tmp_path / "x") == expected


def test_fingerprint_ignores_the_order_of_keys_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint(1) != fingerprint("1")


def test_write_dir_through_a_link_replaces_what_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    for name in ("new", "newer"):
        with write_dir(tmp_path / "link") as directory:
            (directory / name).write_text(name)
        assert entries(tmp_path / "real") == [name]
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2
    # What a dangling link leads to is made.
    (tmp_path / "dangling").symlink_to("made")
    with write_dir(tmp_path / "dangling") as directory:
        (directory / "x").write_text("x")
    assert entries(tmp_path / "made") == ["x"]


@pytest.mark.parametrize("link", [False, True])
def test_write_dir_replaces_no_file(tmp_path, link):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file"
    if link:
        path = tmp_path / "link"
        path.symlink_to("file")
    before = entries(tmp_path)
    with pytest.raises(ConfigError, match="file: is no directory that can be replaced"):
        with write_dir(path):
            raise AssertionError("the body ran")
    assert entries(tmp_path) == before and (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="/: is no directory that can be replaced"):
        with write_dir(Path("/")):
            raise AssertionError("the body ran")


def test_write_dir_removes_leftovers_of_any_kind(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    (tmp_path / ".out.89abcdef.tmp").symlink_to("kept")
    (tmp_path / ".out.old").write_text("a file")
    for _ in range(2):
        with write_dir(tmp_path / "out") as directory:
            (directory / "x").write_text("x")
    assert entries(tmp_path) == ["kept", "kept/mine", "out", "out/x"]


def test_write_dir_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with write_dir(Path("sub") / ".." / "sub" / ".") as directory:
        (directory / "x").write_text("x")
    monkeypatch.chdir(tmp_path / "sub")
    with write_dir(Path(".")) as directory:
        (directory / "y").write_text("y")
    assert entries(tmp_path) == ["sub", "sub/y"]


def test_write_dir_puts_back_what_it_cannot_replace(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_rename", interrupted)
    with pytest.raises(KeyboardInterrupt), write_dir(tmp_path / "out"):
        pass
    assert entries(tmp_path) == ["out", "out/mine"]


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """The old name was known beforehand; even one that is guessed leads nowhere."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "01" * n)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.json.01010101.tmp").symlink_to("mine")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "x.json", [1])
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "x.json").exists()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (hash_file, files.read_text, files.open_file):
            with pytest.raises(OSError, match="is no regular file"):
                read(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        files.open_file(tmp_path)


def test_a_text_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(3 << 30)
    with pytest.raises(OSError, match="more than 67,108,864 bytes"):
        files.read_text(tmp_path / "sparse")
    (tmp_path / "lines").write_bytes("ä\r\nb\rc\n".encode())
    assert files.read_text(tmp_path / "lines") == (tmp_path / "lines").read_text("utf-8")


def test_a_copy_is_hashed_as_it_is_written(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 999_999)
    assert files.copy_file(tmp_path / "a", tmp_path / "b") == hash_file(tmp_path / "b")
    with pytest.raises(FileExistsError):
        files.copy_file(tmp_path / "a", tmp_path / "b")


def test_a_directory_that_another_process_writes_is_no_leftover(tmp_path):
    with write_dir(tmp_path / "out") as first:
        (first / "x").write_text("x")
        with write_dir(tmp_path / "out"):
            assert (first / "x").exists()
        # What lies there by another name is somebody's.
        (tmp_path / ".out.mine.tmp").mkdir()
    assert entries(tmp_path) == [".out.mine.tmp", "out", "out/x"]


def test_what_a_kill_left_aside_is_put_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "x").write_text("x")
    files.restore_dir(tmp_path / "out")
    assert entries(tmp_path) == ["out", "out/x"]
    (tmp_path / ".out.old").symlink_to("out")
    files.restore_dir(tmp_path / "out")
    assert entries(tmp_path) == [".out.old", "out", "out/x"]
