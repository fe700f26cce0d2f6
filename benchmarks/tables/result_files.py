"""Reading results/*.json, kinds of tasks, cells and tables in Markdown; for all of this folder."""

import json
import statistics
from functools import cache

from benchmarks import RESULTS


def reader(directory=RESULTS, **known):
    """Returns `read(name)`: what is known, as of a script that just measured it, or the file's.

    A file is read once; its content is not to be changed.
    """

    @cache
    def read(name):
        if name in known:
            return known[name]
        path = directory / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SystemExit(f"{path}: no such file; the script of this name writes it") from None
        except ValueError as error:
            raise SystemExit(f"{path}: not JSON: {error}") from None

    return read


def markdown(header, rows, left=1):
    """Lines of a table, all columns but the first so many to the right."""
    marks = ["---"] * left + ["--:"] * (len(header) - left)
    first, *others = (f"| {' | '.join(line)} |" for line in (header, *rows))
    return [first, f"|{'|'.join(marks)}|", *others]


def kind_of(task):
    """The kind of a task: the part of its name before the language."""
    return task.split("-")[0]


def spread(values, form):
    """The mean, and the range if there are several."""
    middle = format(statistics.mean(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})"
