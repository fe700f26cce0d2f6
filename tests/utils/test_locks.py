"""All that is installed is known to the byte."""

import re

import tomllib
import yaml
from helpers import ROOT
from packaging.requirements import Requirement


def pinned(path):
    """(name, version) that a lock file installs, some of them for one Python; all with a hash."""
    entries = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    entries = [entry for entry in entries if entry.strip() and not entry.startswith("#")]
    assert entries and all("--hash=sha256:" in entry for entry in entries)
    return [re.match(r"([\w.-]+)==(\S+)", entry.lower()).groups() for entry in entries]


def test_actions_are_named_by_commit_and_may_do_little():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        uses = re.findall(r"uses: (.*)", text)
        assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", x) for x in uses)
        assert yaml.safe_load(text)["permissions"] in ({}, {"contents": "read"})


def test_the_locks_have_what_the_project_asks_for_with_hashes():
    locks = {path.stem: pinned(path) for path in (ROOT / "requirements").glob("*.txt")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    for lock, requirements in (
        ("demo", base),
        ("test", [*base, *extras["test"]]),
        ("model", extras["demo"]),
    ):
        for requirement in map(Requirement, requirements):
            # torch is left to pip: whoever has a build for the CPU keeps it.
            if requirement.name != "torch":
                name = requirement.name.lower()
                versions = [version for other, version in locks[lock] if other == name]
                assert versions and all(map(requirement.specifier.contains, versions)), name
        assert lock == "model" or {"pip", "setuptools", "setuptools-scm"} <= {*dict(locks[lock])}
