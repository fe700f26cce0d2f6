"""benchmarks/tables: the committed pages say what the committed results say, and no more."""

import io
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


@pytest.mark.slow
def test_the_committed_pages_are_what_the_committed_results_say(tmp_path):
    assert tables(BENCHMARKS, "--check") == (0, [], "")
    assert len(TABLES) >= 11 and len(set(TABLES)) == len(TABLES)
    # No table of results but in regions, and all plots are shown.
    others = [BENCHMARKS / "README.md", *BENCHMARKS.glob("notes/*.md")]
    every = "\n".join([*PAGES, *(path.read_text(encoding="utf-8") for path in others)])
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", every, flags=re.DOTALL)
    assert not re.search(r"^\|", outside, re.MULTILINE)
    assert sorted(re.findall(r"!\[.+\]\(../plots/(.+)\)", "\n".join(PAGES))) == PLOTS
    # What is stale is named, and written anew.
    for name in ("pages", "plots", "results"):
        shutil.copytree(BENCHMARKS / name, tmp_path / name)
    page = tmp_path / "pages" / "slots.md"
    text = page.read_text("utf-8")
    page.write_text(text.replace("| 0.", "| 9."), "utf-8")
    code, stale, _ = tables(tmp_path, "--check")
    assert code == 1 and "table slots: not what the results say" in stale
    assert tables(tmp_path)[0] == 0 and page.read_text("utf-8") == text


# Shares of the bytes, which name rows, goals, quantiles, and those of the paper.
TYPED = {"12.5", "6.25", "1.5", "0.75", "0.003", "0.010", "0.005", "0.03", "0.02", "0.04", "0.08",
         "0.2", "99.5", "0.9", "0.5", "0.99", "26.0", "22.5"}  # fmt: skip
TEMPLATES = {"experiment.md.jinja": "experiment", "ablations.md.jinja": "experiment_24"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_number_of_a_result_is_typed_and_all_that_is_said_was_measured(name):
    text = (findings.TEMPLATES / name).read_text(encoding="utf-8")
    outside = re.sub(r"\{\{.*?\}\}", "", text)
    for source in (BENCHMARKS / "tables").glob("*.py"):
        outside += source.read_text("utf-8") if source.name != "plots.py" else ""
    assert set(re.findall(r"(?<![\w.])\d+\.\d+", outside)) <= TYPED
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
        '{{ it.ahead("D2C, mean", "random").difference | points }}\n{{ it("auto", 9).kept }}'
    )
    monkeypatch.setattr(findings, "TEMPLATES", tmp_path)
    line, missing = findings.findings(reader(), "one.jinja", "experiment")
    losses, scores = 0, 1
    ceiling, auto = values(scores, "individual", None).mean(), values(scores, "auto", "6.25%")
    gap = values(losses, "auto", "6.25%").mean() - values(losses, "individual", None).mean()
    mean, random = (values(scores, name, "12.5%").mean() for name in ("D2C, mean", "random"))
    gec = values(scores, "K-Means", "12.5%", "gec-").mean()
    assert line.split("|") == [f"{100 * auto.mean() / ceiling:.1f} %", f"{gap:.3f}", f"{gec:.1f}",
                               f"{ceiling:.1f}", f"{mean - random:.1f}"]  # fmt: skip
    assert missing == "- *Not measured: method auto, budget 9%.*"
