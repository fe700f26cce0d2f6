"""Make the rows of an open task library from text of packages that anybody can install.

    python -m benchmarks.library.rows --output DIR --cache DIR [--only gec-de,qa-en]

Writes `<task>/{train,probe,test}.jsonl`, one task at a time, whole or not at all; a stopped run
continues with the first task that is missing or was made of something else. What a task was made
of and its hashes go to `<task>/made.json`, all of them to `--manifest`. A source that cannot be had
is one line; tasks without it are made, and the exit code is 1.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from benchmarks import command_line
from benchmarks.library.sources import SourceError, Sources
from benchmarks.library.splits import LIMITS, split
from benchmarks.library.tasks import gec, num_date, qa, reply, summ, tone, translate
from d2c_mlx.utils.files import fingerprint, hash_file, write_dir, write_json

HERE = Path(__file__).parent
# Settings that decide the rows, beside seed and pins.
CODE = (Path(__file__), HERE / "sources.py", HERE / "splits.py",
        *sorted((HERE / "tasks").glob("*.py")), HERE / "tasks" / "words.yaml")  # fmt: skip
# Task -> (module, kind, language).
TASKS = {
    f"{kind}-{language}": (module, kind, language)
    for module in (gec, qa, summ, reply, tone, num_date, translate)
    for kind, languages in module.LANGUAGES.items()
    for language in languages
}
LEAST = {"train": 400, "probe": 40, "test": 60}


def make(name: str, sources: Sources, seed: int, directory: Path) -> dict:
    """Write a task's rows into a directory; its line of the manifest."""
    module, kind, language = TASKS[name]
    splits, dropped = split(module.rows(kind, language, sources, seed), seed)
    line = {
        "sources": [sources.provenance(one) for one in module.needs(kind, language)],
        "ship": all(sources.pins[one]["ship"] for one in module.needs(kind, language)),
        "rows": {}, "groups": {}, "sha256": {}, "dropped": dropped,
    }  # fmt: skip
    for part, some in splits.items():
        file = directory / f"{part}.jsonl"
        lines = (json.dumps(row.message(), ensure_ascii=False) + "\n" for row in some)
        file.write_text("".join(lines), encoding="utf-8")
        line["rows"][part] = len(some)
        line["groups"][part] = len({row.group for row in some})
        line["sha256"][part] = hash_file(file)
    every = [row for some in splits.values() for row in some]
    if not every:
        raise SourceError(f"{name}: no rows found in {', '.join(module.needs(kind, language))}")
    line["mean_characters"] = {
        "prompt": round(mean(len(row.prompt) for row in every), 1),
        "answer": round(mean(len(row.answer) for row in every), 1),
    }
    return line


def ready(name: str, sources: Sources, seed: int, output: Path, code: str) -> tuple[dict, bool]:
    """A task's line of the manifest, and whether it had to be made."""
    module, kind, language = TASKS[name]
    pins = {one: sources.pins[one]["sha256"] for one in module.needs(kind, language)}
    of = fingerprint({"seed": seed, "pins": pins, "code": code, "limits": LIMITS})
    try:
        made = json.loads((output / name / "made.json").read_text(encoding="utf-8"))
        files = {part: hash_file(output / name / f"{part}.jsonl") for part in LIMITS}
        if made["of"] == of and made["line"]["sha256"] == files:
            return made["line"], False
    except (OSError, ValueError, KeyError):
        pass
    for one in module.needs(kind, language):
        sources.require(one)
    with write_dir(output / name) as directory:
        line = make(name, sources, seed, directory)
        write_json(directory / "made.json", {"of": of, "line": line})
    return line, True


def parse(arguments=None):
    """The options."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--output", type=Path, required=True, help="<task>/*.jsonl, outside git")
    parser.add_argument("--cache", type=Path, required=True, help="downloads")
    parser.add_argument("--only", help="tasks, separated by commas")
    parser.add_argument("--sources", type=Path, default=HERE / "sources.yaml")
    parser.add_argument("--manifest", type=Path, help="default: manifest.json in the output")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.names = options.only.split(",") if options.only else list(TASKS)
    unknown = [name for name in options.names if name not in TASKS]
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return options


def main(arguments=None) -> int:
    """Make what is missing; 1 if a source or a task failed."""
    options = parse(arguments)
    sources = Sources(options.sources, options.cache)
    code = fingerprint([hash_file(file) for file in CODE])
    lines, failed = {}, {}
    for i, name in enumerate(options.names, 1):
        try:
            lines[name], new = ready(name, sources, options.seed, options.output, code)
        except SourceError as error:
            failed.setdefault(str(error), []).append(name)
            continue
        counts = " ".join(f"{part} {n}" for part, n in lines[name]["rows"].items())
        few = [part for part, n in lines[name]["rows"].items() if n < LEAST[part]]
        print(f"{i}/{len(options.names)} {name}: {counts}{'' if new else ' (there already)'}"
              f"{' FEW: ' + ', '.join(few) if few else ''}", flush=True)  # fmt: skip
    manifest = {
        "seed": options.seed, "limits": LIMITS, "tasks": lines,
        "failed": {name: line for line, names in failed.items() for name in names},
    }  # fmt: skip
    write_json(options.manifest or options.output / "manifest.json", manifest)
    for line, names in failed.items():
        print(f"{line} (not made: {', '.join(names)})", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
