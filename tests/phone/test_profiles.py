"""Device profiles: the built-in ones are complete, a user's file is checked as a whole."""

import pytest
from helpers import ROOT

from d2c_mlx.phone.config import builtin_profiles, find_profile
from d2c_mlx.utils.errors import ConfigError, InputError

GOOD = "memory: 2.1GB\n  memory_source: measured\n  storage: 500MB\n  storage_source: store\n"


def test_builtin_profiles():
    found = builtin_profiles()
    names = ("iphone-6gb", "iphone-8gb", "iphone-12gb", "mac-8gb", "mac-16gb", "android-8gb")
    assert tuple(found) == names
    for name, profile in found.items():
        installed = int(name.split("-")[1].removesuffix("gb")) * 1_000_000_000
        assert 0 < profile.memory < installed
        for source in (profile.memory_source, profile.storage_source):
            assert "https://" in source or source.startswith("estimate")


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(f"iphone-12-mini:\n  {GOOD}")
    name, profile = find_profile(str(path))
    assert (name, profile.memory, profile.storage) == (
        "iphone-12-mini", 2_100_000_000, 500_000_000
    )  # fmt: skip


def test_the_profile_in_the_documents_is_one(tmp_path):
    text = (ROOT / "docs" / "how-to" / "ios.md").read_text()
    path = tmp_path / "phone.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert find_profile(str(path))[1].memory == 2_400_000_000


def test_every_problem_of_a_file_is_told(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("one:\n  memory: 3\n  memory_source: ''\n  ram: 4GB\n  storage: 50%\ntwo: 5\n")
    with pytest.raises(InputError) as caught:
        find_profile(str(path))
    fields = [line.removeprefix(f"{path}: ").split(": ")[:2] for line in caught.value.problems]
    assert [".".join(field) for field in fields[:-1]] == [
        "one.ram", "one.memory", "one.memory_source", "one.storage", "one.storage_source"
    ]  # fmt: skip
    assert fields[-1][0] == "two"
    assert 'found 3, expected bytes such as "4.2GB"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not readable as YAML"),
        ("", "expected NAME:"),
        ("- 1", "expected `key: value` lines, found list"),
        ("a:\n  memory: 2020-13-45\n", "not readable as YAML (month must be in 1..12"),
        ("[" * 100_000, "not readable as YAML (maximum recursion"),
        (f"a:\n  {GOOD}b:\n  {GOOD}", "holds 2 profiles (a, b), expected one"),
    ],
)
def test_files_that_are_no_profile(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_profile(str(path))
    assert len(caught.value.problems) == 1 and words in str(caught.value)


def test_names_that_are_no_profile(tmp_path):
    with pytest.raises(ConfigError, match="expected iphone-6gb, iphone-8gb"):
        find_profile("iphone")
    with pytest.raises(ConfigError, match="no such file"):
        find_profile(str(tmp_path / "none.yaml"))
