"""What is installed and run for this project is known to the byte."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


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


def test_the_tests_of_the_oldest_and_newest_versions_are_there():
    printed = subprocess.run(["make", "-n", "check-lowest"], cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout  # fmt: skip
    (command,) = (line for line in printed.splitlines() if line.startswith(".venv-bounds/bin/py"))
    _, *paths = command.split()
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_a_hash(path):
    assert pinned(path)


def test_the_lock_has_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, asked in (
        ("demo", project["dependencies"]),
        ("test", [*project["dependencies"], *project["optional-dependencies"]["test"][1:]]),
        ("model", project["optional-dependencies"]["demo"]),
    ):
        found = pinned(ROOT / "requirements" / f"{lock}.txt")
        for one in map(Requirement, asked):
            # Left to pip: whoever has a build for the CPU keeps it.
            if one.name == "torch":
                continue
            assert all(map(one.specifier.contains, found[one.name.lower()])), one
        assert lock == "model" or {"pip", "setuptools", "setuptools-scm"} <= found.keys()


@pytest.mark.slow
def test_the_version_is_that_of_the_tag(tmp_path):
    """And says so where there is no tag, or no git; it needs nothing but this file."""
    pytest.importorskip("setuptools_scm", reason="an environment without requirements/build.in")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def call(*argv):
        env = {**os.environ, **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "x"),
               **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "x@x")}  # fmt: skip
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def version():
        return call(sys.executable, "-m", "setuptools_scm")

    assert version() == "0.1.dev0"
    call("git", "init", "-q")
    call("git", "add", "pyproject.toml")
    call("git", "commit", "-qm", "one")
    assert re.fullmatch(r"0\.1\.dev1\+g[0-9a-f]+", version())
    call("git", "tag", "v1.2.3")
    assert version() == "1.2.3"
    call("git", "commit", "-qm", "two", "--allow-empty")
    assert re.fullmatch(r"1\.2\.4\.dev1\+g[0-9a-f]+", version())


def test_data_of_cldr_comes_with_its_licence():
    demo = ROOT / "examples" / "demo"
    assert "LICENSE.unicode" in (demo / "SOURCES.md").read_text()
    assert "UNICODE LICENSE V3" in (demo / "LICENSE.unicode").read_text()
