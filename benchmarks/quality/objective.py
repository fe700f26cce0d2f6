"""Loss, divergence or answers: the measure that `--merge-method auto` should choose by.

    python -m benchmarks.quality.objective --library DIR [--clusters 3] [--seeds 0,1,2]
        [--kinds date,num,qa]

Every cluster of a run is merged by each method that `auto` tries, on any model. The probe rows
judge a merge in three ways: by the loss of their own answers, by the divergence from the task
adapters, and by the score of greedy answers (metrics.py). Test rows then judge what each of the
three would choose. What is in the results is not measured again. Tasks of other kinds are merged
but not judged. Results: results/objective.json.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.quality.answering import Answers
from benchmarks.quality.metrics import row_stats, task_score
from benchmarks.quality.slots import probes_of
from benchmarks.tables.pages import show
from d2c_mlx.evaluate.answers import prompt_and_expected
from d2c_mlx.evaluate.workers import make_workers
from d2c_mlx.merge.options import AUTO_METHODS
from d2c_mlx.models.tasks import load_task
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

# The best of the last two that the model allows is tried beside the others.
METHODS = (*AUTO_METHODS, "regmean++", "layerwise")


class Judge:
    """Scores of answers to probe and test rows of the judged tasks of one draw."""

    def __init__(self, session, directory, kinds):
        """Read the rows of the tasks of these kinds; a model of its own answers them."""
        names, self.session = session.inputs.names, session
        self.tasks = [i for i, name in enumerate(names) if name.split("-")[0] in kinds]
        self._n = session.config.probe_examples
        rows = {}
        for i in self.tasks:
            task = load_task(Path(session.config.tasks) / names[i])
            rows[names[i]] = task.probe[: self._n] + task.test[: session.config.test_examples]
        sets = [session.inputs.base.encode(name, some) for name, some in rows.items()]
        self._answers = Answers(directory, sets, session.config.model, make_workers(True, 1))
        self._rows = {name: [tuple(prompt_and_expected(row).values()) for row in some]
                      for name, some in rows.items()}  # fmt: skip

    def scores(self, serves):
        """Task -> score on its probe rows and on its test rows, in percent."""
        given, found = self._answers.serving(serves), {}
        for name, answers in given.items():
            stats = [row_stats(name, *row, one) for row, one in zip(self._rows[name], answers)]
            parts = np.array(stats[: self._n]), np.array(stats[self._n :])
            found[name] = [task_score(name, part) for part in parts]
        return found

    def judged(self, serves):
        """Judge the adapters that serve some tasks, by their indices.

        Returns:
            Task -> loss and divergence of its probes, as regrets; the loss of its tests, in nats
            per target token; and the scores of both.
        """
        session, names = self.session, self.session.inputs.names
        scores, found = self.scores({names[i]: one for i, one in serves.items()}), {}
        for i, adapter in serves.items():
            ((loss,),) = session.study.problem.measure([(adapter, [i])])
            ((test,),) = session.evaluator.losses([(adapter, [session.inputs.tests[i]])])
            found[names[i]] = {
                "loss": float(loss),
                "divergence": float(session.study.teacher_regret.under(adapter, [i])[0]),
                "score": scores[names[i]][0],
                "test_loss": float(test),
                "test_score": scores[names[i]][1],
            }
        return found


def judged(judge, members, there):
    """Yield methods, or "own", and what they make of a cluster's judged tasks, if not `there`."""
    session, some = judge.session, [i for i in members if i in judge.tasks]
    if len(members) == 1 or not some:
        return
    for method in ("own", *METHODS):
        if method not in there:
            served = {i: session.adapters[i] for i in some}
            if method != "own":
                served = dict.fromkeys(some, merged(session, members, method))
            yield method, judge.judged(served)


def merged(session, members, method):
    """The merge of these members by a method, at the scale that the run would tune."""
    merger = session.study.merger_with(session.config.replace(merge_method=method).merging)
    return merger.final(members).adapter


def clusters_of(session):
    """The members of every cluster that a run found."""
    (found,) = session.read("clusters.json")["methods"]["d2c"]
    labels = np.array(found["labels"])
    return [tuple(map(int, np.flatnonzero(labels == k))) for k in range(labels.max() + 1)]


def measure(options, config, rows):
    """Add what is missing to the rows of a draw, one per cluster; yield after every method."""
    session = run(config, until="cluster", quiet=True)
    judge = Judge(session, options.work / f"answers-{config.seed}", options.kinds.split(","))
    for members in clusters_of(session):
        row = {"seed": config.seed, "members": [session.inputs.names[i] for i in members]}
        (row,) = [one for one in rows if row.items() <= one.items()] or [row | {"methods": {}}]
        for method, found in judged(judge, members, row["methods"]):
            if not row["methods"]:
                rows.append(row)
            row["methods"][method] = found
            yield f"{row['seed']} {method}: {', '.join(row['members'])}"


def measure_all(options):
    """Measure what is missing; results are written after every method."""
    settings = {key: getattr(options, key) for key in ("clusters", "examples", "tests", "kinds")}
    content = {"settings": settings, "rows": [], "machine": machine()}
    if options.output.exists():
        content = json.loads(options.output.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise SystemExit(f"{options.output}: found {content['settings']}, expected {settings};"
                             " give another --output")  # fmt: skip
    for seed in map(int, options.seeds.split(",")):
        tasks = probes_of(options.library, seed, options.examples, options.work / f"tasks-{seed}")
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(tasks), seed=seed,
            output=str(options.work / f"{options.clusters}-{seed}-objective"),
            budget=str(options.clusters), probe_examples=options.examples,
            test_examples=options.tests,
        )  # fmt: skip
        for said in measure(options, config, content["rows"]):
            write_json(options.output, content)
            print(said, flush=True)
    return content


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "objective.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=3)
    parser.add_argument("--seeds", default="0,1,2", help="each takes other probe rows")
    parser.add_argument("--kinds", default="date,num,qa", help="tasks that are judged")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--work", type=Path, help="run directories and answers, to be used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        options.work = options.work or Path(directory)
        content = measure_all(options)
    show("objectives", objective=content)


if __name__ == "__main__":
    main()
