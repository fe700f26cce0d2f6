"""Two adapters for one job that needs both: in one pass, in two, or trained for the job.

    python -m benchmarks.new_task.two_tasks --library DIR [--job dates] [--languages de,fr]
        [--rows 10,40]

- *dates*: a date with its year in words; date-de writes "24. Oktober 1992", num-de turns 1992 into
  words. Rows join those two tasks' own where they have the same year, and no year is both learned
  and held out. *Two passes* ask date-de, then num-de for the year of its answer; a program puts the
  two together, which a loss cannot judge.
- *summaries*: an English line for a foreign description, which summ-de writes in German and
  translate-de translates; rows of brief-de, without texts that summ-de has learned.

Nothing is chosen by the rows: a merge is the mean or the sum of both, a LoRA is as it was trained.
Resumes case by case.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.library.tasks import translate
from benchmarks.library.tasks.languages import NAMES
from benchmarks.new_task.compose import judge, scores
from benchmarks.quality.metrics import answer_metrics
from benchmarks.tables.pages import show
from d2c_mlx.compose.methods import NewTask, find_method, mix
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, answer_rows, prompt_and_expected
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.files import write_json

YEAR = re.compile(r"\d{4}")
AS_SUMM = ("short English line", "short line")
NUMBER = "Write this number in {} words: {}"
# Name of the table -> method and its fixed choice.
TRAINED = {
    "joint LoRA": ("fresh", 1.0),
    "mean, calibrated": ("calibrated", 0.5),
    "sum, calibrated": ("calibrated", 1.0),
    "mean, trained on": ("mean-trained", 1.0),
}


def chat(prompt, answer):
    """A row in mlx-lm's chat format."""
    roles = {"system": "", "user": prompt, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def pairs(library, task, splits=("probe", "test", "train")):
    """(prompt, answer) of the rows of a task."""
    for split in splits:
        path = library / "tasks" / task / f"{split}.jsonl"
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            one = prompt_and_expected(json.loads(line))
            yield one["prompt"], one["expected"]


def dates(library, language, seed=0):
    """(rows to learn from, held-out rows) in random order; no year is in both."""
    numbers = pairs(library, f"num-{language}")
    words = {prompt.split()[-1]: answer for prompt, answer in numbers}
    by_year = {}
    for prompt, answer in pairs(library, f"date-{language}"):
        (year,) = YEAR.findall(answer)
        if year in words:
            ask = prompt.replace(":", ", the year in words:")
            by_year.setdefault(year, []).append(chat(ask, answer.replace(year, words[year])))
    rng = random.Random(seed)
    years = rng.sample(sorted(by_year), len(by_year))
    parts = [[row for year in some for row in by_year[year]] for some in (years[::2], years[1::2])]
    return [rng.sample(part, len(part)) for part in parts]


def summaries(library, language):
    """(rows to learn from, held-out rows) of brief; no text that summ was trained on."""
    known = {prompt for prompt, _ in pairs(library, f"summ-{language}", ["train"])}
    return [
        [chat(prompt, answer) for prompt, answer in pairs(library, f"brief-{language}", splits)
         if prompt.replace(*AS_SUMM) not in known]
        for splits in (["probe", "train"], ["test"])
    ]  # fmt: skip


def date_then_number(base, date, num, language, prompts):
    """Answers of two passes."""
    first = answers(base, date, [one.replace(", the year in words", "") for one in prompts])
    years = [(YEAR.findall(one) or ["0"])[0] for one in first]
    words = answers(base, num, [NUMBER.format(NAMES[language], year) for year in years])
    return [one.replace(year, word) for one, year, word in zip(first, years, words)]


def summary_then_translation(base, short, english, language, prompts):
    """Answers of two passes."""
    lines = answers(base, short, [one.replace(*AS_SUMM) for one in prompts])
    return answers(base, english, [translate.prompt(language, line) for line in lines])


def answers(base, adapter, prompts):
    """Greedy answers to prompts; the answers that rows need are stand-ins of a usual length."""
    rows = [chat(prompt, "eintausendneunhundertzweiundneunzig") for prompt in prompts]
    encoded = base.encode("", rows)
    found = answer_rows(base, {"said": BenchMethod(0, [{"": adapter}])}, [(rows, encoded)])
    return [one["said"] for one in found[""]]


@dataclass(frozen=True)
class Job:
    """A job that two adapters do one after the other.

    Attributes:
        kinds: kind of the task of each adapter, and what the table calls it.
        rows: of (library, language), makes the rows to learn from and those held out.
        passes: of (base, adapter, adapter, language, prompts), answers.
    """

    kinds: dict[str, str]
    rows: Callable
    passes: Callable


JOBS = {
    "dates": Job({"date": "date", "num": "number"}, dates, date_then_number),
    "summaries": Job({"summ": "summary", "translate": "translation"}, summaries,
                     summary_then_translation),
}  # fmt: skip


def measure(scorer, adapters, job, language, options):
    """Name -> loss and scores of every method, for each number of rows."""
    base, named = scorer.engine.base, {one.name: one for one in adapters}
    pair = [named[f"{kind}-{language}"] for kind in job.kinds]
    task = NewTask("joint", base, scorer, pair)
    learned, held = job.rows(options.library, language)
    rows, held = base.encode("joint", learned[: options.n_rows]), held[: options.tests]
    judged = {
        "base": None,
        **dict(zip(job.kinds.values(), pair)),
        "mean": mix(pair, (0.5, 0.5), task.rank),
        "sum": mix(pair, (1, 1), task.rank),
    }
    for name, (method, choice) in TRAINED.items():
        judged[name] = find_method(method)(task, rows, choice).uniform(base.dtype)
    parts = judge(scorer, judged, base.encode("joint", held), held, judged)
    asked = [prompt_and_expected(row) for row in held]
    said = job.passes(base, *pair, language, [one["prompt"] for one in asked])
    found = [{**one, "said": text} for one, text in zip(asked, said)]
    return parts | {"two passes": scores(answer_metrics({"": found}, ["said"])["said"])}


def main():
    """Measure what is missing, print all of it."""
    parser = command_line(__doc__, __spec__, "two_tasks.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--job", choices=JOBS, default="dates")
    parser.add_argument("--languages", default="de,fr")
    parser.add_argument("--rows", default="10,40")
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    base, adapters, _, _ = load_library(options.library, 1)
    scorer = Scorer(Engine(base), LossCache(cache_directory() / "losses.sqlite"))
    for n_rows in map(int, options.rows.split(",")):
        options.n_rows = n_rows
        for language in options.languages.split(","):
            row = {"job": options.job, "language": language, "rows": n_rows}
            if any(row.items() <= one.items() for one in found["rows"]):
                continue
            methods = measure(scorer, adapters, JOBS[options.job], language, options)
            found = {"machine": machine(), "rows": [*found["rows"], {**row, "methods": methods}]}
            write_json(options.output, found)
            print(*row.values(), "rows", flush=True)
    show("two-tasks", two_tasks=found)


if __name__ == "__main__":
    main()
