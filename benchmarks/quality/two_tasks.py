"""Two adapters for one job that needs both: in one pass, in two, or trained for the job.

    python -m benchmarks.quality.two_tasks --library DIR [--languages de,fr] [--rows 10,40]

The job is to write a date with its year in words: date-de writes "24. Oktober 1992", num-de turns
1992 into words. Its rows join those two tasks' own where they have the same year, and no year is
both learned and held out. *Two passes* ask date-de, then num-de for the year of its answer; a
program puts the two together, which a loss cannot judge. Nothing is chosen by the rows: a merge is
the mean or the sum of both, a LoRA is as it was trained. Resumes case by case.
"""

import json
import random
import re
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.quality.compose import judge, scores
from benchmarks.tables.pages import show
from d2c_mlx.compose.methods import METHODS
from d2c_mlx.compose.mixing import mix
from d2c_mlx.compose.new_task import Kept, NewTask
from d2c_mlx.evaluate.answers import answer_rows, prompt_and_expected
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.metrics import answer_metrics
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.files import write_json

YEAR = re.compile(r"\d{4}")
NUMBER = "Write this number in {} words: {}"
NAMES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French"}
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


def pairs(library, task):
    """(prompt, answer) of all rows of a task."""
    for split in ("probe", "test", "train"):
        path = library / "tasks" / task / f"{split}.jsonl"
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            one = prompt_and_expected(json.loads(line))
            yield one["prompt"], one["expected"]


def joint_rows(library, language, seed=0):
    """(rows to learn from, held-out rows) in random order; no year is in both."""
    words = {prompt.split()[-1]: answer for prompt, answer in pairs(library, f"num-{language}")}
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


def two_passes(base, date, num, language, held):
    """ChrF and share of exact answers of one adapter after the other."""
    asked = [prompt_and_expected(row) for row in held]
    first = answers(base, date, [one["prompt"].replace(", the year in words", "") for one in asked])
    years = [(YEAR.findall(one) or ["0"])[0] for one in first]
    words = answers(base, num, [NUMBER.format(NAMES[language], year) for year in years])
    said = [one.replace(year, word) for one, year, word in zip(first, years, words)]
    rows = [{**one, "said": text} for one, text in zip(asked, said)]
    return scores(answer_metrics({"": rows}, ["said"])["said"])


def answers(base, adapter, prompts):
    """Greedy answers to prompts; the answers that rows need are stand-ins of a usual length."""
    rows = [chat(prompt, "eintausendneunhundertzweiundneunzig") for prompt in prompts]
    encoded = base.encode("", rows)
    found = answer_rows(base, {"said": BenchMethod(0, [{"": adapter}])}, [(rows, encoded)])
    return [one["said"] for one in found[""]]


def measure(evaluator, adapters, language, n_rows, options):
    """The row of one language and number of rows."""
    base = evaluator.runner.base
    learned, held = joint_rows(options.library, language)
    pair = [one for kind in ("date", "num") for one in adapters if one.name == f"{kind}-{language}"]
    task = NewTask("joint", base, evaluator, pair, kept=Kept(cache_directory() / "trained"))
    rows = base.encode("joint", learned[:n_rows])
    judged = {
        "base": None,
        "date": pair[0],
        "number": pair[1],
        "mean": mix(pair, (0.5, 0.5), task.rank),
        "sum": mix(pair, (1, 1), task.rank),
    }
    for name, (method, choice) in TRAINED.items():
        judged[name] = METHODS[method].make(task, rows, choice).uniform(base.dtype)
    held = held[: options.tests]
    parts = judge(evaluator, judged, base.encode("joint", held), held, judged)
    parts["two passes"] = two_passes(base, *pair, language, held)
    return {"language": language, "rows": n_rows, "methods": parts}


def main():
    """Measure what is missing, print all of it."""
    parser = command_line(__doc__, __spec__, "two_tasks.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--languages", default="de,fr")
    parser.add_argument("--rows", default="10,40")
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    base, adapters, _, _ = load_library(options.library, 1)
    evaluator = Evaluator(Engine(base), LossCache(cache_directory() / "losses.sqlite"))
    for n_rows in map(int, options.rows.split(",")):
        for language in options.languages.split(","):
            if any((one["language"], one["rows"]) == (language, n_rows) for one in found["rows"]):
                continue
            row = measure(evaluator, adapters, language, n_rows, options)
            found = {"machine": machine(), "rows": [*found["rows"], row]}
            write_json(options.output, found)
            print(language, n_rows, "rows", flush=True)
    show("two-tasks", two_tasks=found)


if __name__ == "__main__":
    main()
