"""benchmarks/tables: the committed pages say what the committed results say, and no more."""

import io
import json
import random
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from helpers import ROOT

from benchmarks.tables import findings
from benchmarks.tables.__main__ import main
from benchmarks.tables.result_files import reader

BENCHMARKS = ROOT / "benchmarks"
PAGES = [path.read_text(encoding="utf-8") for path in sorted(BENCHMARKS.glob("pages/*.md"))]
TABLES = re.findall(r"^<!-- table: (.*) -->$", "\n".join(PAGES), re.MULTILINE)
PLOTS = sorted(path.name for path in (BENCHMARKS / "plots").iterdir())
# Goals, the only numbers of tables that are no results.
CONSTANTS = {"0.003", "0.010", "0.005", "0.03", "0.02", "0.04", "0.08", "0.2", "99.5%"}


def tables(directory, *options):
    """Exit code, output and errors of `python -m benchmarks.tables`, without a process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tables", "--directory", str(directory), *options])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue().splitlines(), err.getvalue()


def with_other_numbers(directory, seed=0):
    """The same results with other numbers, each by a factor of its own so that ratios change too.

    Whole numbers are keys and counts, and stay, unless they are as large as bytes. Factors are of a
    whole range: with a few, some ratio of two numbers would stay as it is.
    """
    rng = random.Random(seed)

    def other(value):
        if isinstance(value, dict):
            return {key: other(part) for key, part in value.items()}
        if isinstance(value, list):
            return [other(part) for part in value]
        if isinstance(value, int) and value > 1_000_000:
            return int(value * rng.uniform(2, 17))
        return value * rng.uniform(2, 17) + 0.1 if isinstance(value, float) else value

    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        changed = json.dumps(other(json.loads(path.read_text())))
        (directory / "results" / path.name).write_text(changed)


def cells(directory):
    """Of all tables in regions but for their headers and first columns."""
    text = "\n".join(path.read_text("utf-8") for path in sorted(directory.glob("pages/*.md")))
    regions = re.findall(r"<!-- table: .*? -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return [
        cell.strip()
        for table in regions for line in table.splitlines()[2:] for cell in line.split("|")[2:-1]
    ]  # fmt: skip


def test_the_committed_pages_are_what_the_committed_results_say():
    assert tables(BENCHMARKS, "--check") == (0, [], "")
    assert len(TABLES) >= 11 and len(set(TABLES)) == len(TABLES)
    # No table of results but in regions, and all plots are shown.
    others = [BENCHMARKS / "README.md", *BENCHMARKS.glob("notes/*.md")]
    every = "\n".join([*PAGES, *(path.read_text(encoding="utf-8") for path in others)])
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", every, flags=re.DOTALL)
    assert not re.search(r"^\|", outside, re.MULTILINE)
    assert sorted(re.findall(r"!\[.+\]\(../plots/(.+)\)", "\n".join(PAGES))) == PLOTS


@pytest.mark.slow
def test_other_results_give_other_tables(tmp_path):
    """Numbers with a decimal point follow the results; one typed by hand would stay."""
    for name in ("pages", "plots", "results"):
        shutil.copytree(BENCHMARKS / name, tmp_path / name)
    with_other_numbers(tmp_path)
    names = [f"table {name}" for name in TABLES] + [f"plots/{name}" for name in PLOTS]
    stale = [f"{name}: not what the results say" for name in names]
    assert tables(tmp_path, "--check") == (1, stale, "")
    assert tables(tmp_path) == (0, [f"{name}: written" for name in names], "")
    first = cells(tmp_path)
    with_other_numbers(tmp_path, seed=1)
    assert tables(tmp_path)[0] == 0
    # One of a few digits may stay by chance, but not twice.
    rows = list(zip(cells(BENCHMARKS), first, cells(tmp_path), strict=True))
    assert len(rows) > 200
    assert {a for a, b, c in rows if a == b == c and re.search(r"\d\.\d", a)} == CONSTANTS


def test_what_is_broken_is_an_error_in_one_line(tmp_path):
    for name in ("pages", "plots", "results"):
        shutil.copytree(BENCHMARKS / name, tmp_path / name)
    page, result = tmp_path / "pages" / "slots.md", tmp_path / "results" / "slots.json"
    text, numbers = page.read_text("utf-8"), result.read_text()
    for path, content, words in (
        (page, text.replace("table: slots -->", "table: slits -->"), "no table slits"),
        (page, text + "<!-- table: slots -->\n", "region slots has no <!-- end -->"),
        (page, text + "<!-- end -->\n", "<!-- end --> without a region"),
        (result, numbers[:-100], "slots.json: not JSON"),
    ):
        path.write_text(content, "utf-8")
        code, lines, problem = tables(tmp_path, "--check")
        problem = problem or code
        assert lines == [] and words in problem and problem.count("\n") <= 1
        page.write_text(text, "utf-8")
        result.write_text(numbers)


# Sentences, beside numbers taken by numpy. Shares of the bytes name rows; others are the paper's.
TYPED = {"12.5", "6.25", "1.5", "26.0", "22.5"}
TEMPLATES = {"experiment.md.jinja": "experiment", "ablations.md.jinja": "experiment_24"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_number_of_a_result_is_typed_and_all_that_is_said_was_measured(name):
    text = (findings.TEMPLATES / name).read_text(encoding="utf-8")
    outside = re.sub(r"\{\{.*?\}\}", "", text)
    assert set(re.findall(r"(?<!\w)\d+\.\d+", outside)) <= TYPED
    lines = findings.findings(reader(), name, TEMPLATES[name])
    assert all(line.startswith("- ") and "Not measured" not in line for line in lines)


def test_numbers_are_those_of_the_results(tmp_path, monkeypatch):
    result = reader()("experiment")

    def values(of, method, budget, kind=""):
        """`(rows, tasks)` of all seeds and draws."""
        rows = [row for row in result["rows"]
                if (row["method"], row.get("budget")) == (method, budget)]  # fmt: skip
        return np.array([[pair[of] for task, pair in row["tasks"].items() if task.startswith(kind)]
                         for row in rows])  # fmt: skip

    (tmp_path / "one.jinja").write_text(
        '{{ it("auto", 6.25).kept | percent }}|{{ it("auto", 6.25).excess | nats }}|'
        '{{ it("K-Means").scores_of("gec") | points }}|{{ it.ceiling.score | points }}|'
        '{{ it.ahead("D2C, moves", "K-Means").difference | points }}\n{{ it("auto", 9).kept }}'
    )
    monkeypatch.setattr(findings, "TEMPLATES", tmp_path)
    line, missing = findings.findings(reader(), "one.jinja", "experiment")
    losses, scores = 0, 1
    ceiling, auto = values(scores, "individual", None).mean(), values(scores, "auto", "6.25%")
    gap = values(losses, "auto", "6.25%").mean() - values(losses, "individual", None).mean()
    moves, kmeans = (values(scores, name, "12.5%").mean() for name in ("D2C, moves", "K-Means"))
    gec = values(scores, "K-Means", "12.5%", "gec-").mean()
    assert line.split("|") == [f"{100 * auto.mean() / ceiling:.1f} %", f"{gap:.3f}", f"{gec:.1f}",
                               f"{ceiling:.1f}", f"{moves - kmeans:.1f}"]  # fmt: skip
    assert missing == "- *Not measured: method auto, budget 9%.*"
