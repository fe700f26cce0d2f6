"""All that is installed is known to the byte."""

import re
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pinned(path):
    """Name -> versions that a lock file installs, each with a hash."""
    found = {}
    for entry in re.sub(r"\\\n", " ", path.read_text()).splitlines():
        if not entry.strip() or entry.startswith("#"):
            continue
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        assert "--hash=sha256:" in entry, entry
        found.setdefault(name.lower(), []).append(version)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_commit_and_may_do_little(path):
    text = path.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", one) for one in uses)
    assert yaml.safe_load(text)["permissions"] in ({}, {"contents": "read"})


def test_the_locks_have_what_the_project_asks_for_with_hashes():
    assert all(map(pinned, (ROOT / "requirements").glob("*.txt")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, asked in (
        ("demo", project["dependencies"]),
        ("test", [*project["dependencies"], *project["optional-dependencies"]["test"]]),
        ("model", project["optional-dependencies"]["demo"]),
    ):
        found = pinned(ROOT / "requirements" / f"{lock}.txt")
        for one in map(Requirement, asked):
            # torch is left to pip: whoever has a build for the CPU keeps it.
            if one.name != "torch":
                assert all(map(one.specifier.contains, found[one.name.lower()])), one
        assert lock == "model" or {"pip", "setuptools", "setuptools-scm"} <= found.keys()
