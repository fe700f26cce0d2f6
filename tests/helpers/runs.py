"""Looking at run directories."""

import json

from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.files import hash_tree

NAMES = ["a", "b", "c", "d"]


def config_of(paths, output, **options):
    """A run on a tiny library: by default room for two, and few rows."""
    places = {name: str(path) for name, path in paths._asdict().items()}
    few = {"budget": "2", "probe_examples": 3, "test_examples": 2}
    return RunConfig(**places, output=str(output), **few | options)


def stages_started(output):
    """Modification times of the stage records: what ran."""
    files = (output / ".stages").iterdir()
    return {file.stem: file.stat().st_mtime_ns for file in files if file.stem != "finish"}


def records(output):
    """Files of the stages that are done; the one that says a whole run is finished is of none."""
    return [path for path in (output / ".stages").glob("*.json") if path.stem != "finish"]


def artifacts_of(directory):
    """Name -> content of the JSON files that the report of a run is made of."""
    names = ("losses", "bench", "clusters", "merges", "plan", "phone", "pack/manifest")
    paths = [directory / f"{name}.json" for name in names]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


# Both ways through the pipeline: every stage is in one of them.
WAYS = {"slots": {"budget": "2", "refine": True}, "bytes": {"budget": "20%"}}
_DECIDED = ("losses.json", "clusters.json", "merges.json", "plan.json", "pack")


def hashes(output):
    """Of everything that a run decides; times, versions and paths are in other files."""
    result = {name: hash_tree(output / name) for name in _DECIDED if (output / name).exists()}
    if (output / "refines.json").exists():
        facts = json.loads((output / "refines.json").read_text())
        result["refines"] = [{**fact, "seconds": None} for fact in facts]
    return result


def seconds_of(output):
    """Seconds of each stage of a run that came to its end, in order."""
    files = sorted(records(output), key=lambda file: file.stat().st_mtime_ns)
    return {file.stem: json.loads(file.read_text())["seconds"] for file in files}


def flags_of(config):
    """The options of a run as words of the command line."""
    options = {name: config.to_dict()[name] for name in config.model_fields_set}
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        text = ",".join(value) if isinstance(value, list) else value
        words += [flag] if value is True else [] if value is False else [f"{flag}={text}"]
    return words
