"""Looking at run directories."""

import json

NAMES = ["a", "b", "c", "d"]


def stages_started(output):
    """Modification times of the stage records: what ran."""
    files = (output / ".stages").iterdir()
    return {file.stem: file.stat().st_mtime_ns for file in files if file.stem != "finish"}


def records(output):
    """Files of the stages that are done; the one that says a whole run is finished is of none."""
    return [path for path in (output / ".stages").glob("*.json") if path.stem != "finish"]


def artifacts_of(directory):
    """Name -> content of the JSON files that the report of a run is made of."""
    names = [name for name in ("losses", "bench", "clusters", "merges", "plan", "phone")
             if (directory / f"{name}.json").exists()]  # fmt: skip
    found = {name: json.loads((directory / f"{name}.json").read_text()) for name in names}
    return {**found, "manifest": json.loads((directory / "pack" / "manifest.json").read_text())}
