"""benchmarks/tables: the committed pages say what the committed results say, and no more."""

import io
import json
import random
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from helpers import ROOT

from benchmarks.tables import packs
from benchmarks.tables.__main__ import main

BENCHMARKS = ROOT / "benchmarks"
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted(BENCHMARKS.glob("pages/*.md"))
}
ALL = "\n".join(PAGES.values())
TABLES = re.findall(r"^<!-- table: (.*) -->$", ALL, re.MULTILINE)
PLOTS = sorted(path.name for path in (BENCHMARKS / "plots").iterdir())
# Goals, the only numbers of tables that are no results.
CONSTANTS = {"0.003", "0.010", "0.005", "0.03", "0.02", "0.04", "0.08", "0.2", "99.5%"}


def tables(directory, *options):
    """Output and exit code of `python -m benchmarks.tables`, without a process for each call."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tables", "--directory", str(directory), *options])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code
    if isinstance(code, str):  # what Python does with it at its exit
        err.write(f"{code}\n")
        code = 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def contents(directory):
    """Of all files."""
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def page(tmp_path):
    """A copy of the committed pages, their plots and their results."""
    for name in ("pages", "plots", "results"):
        shutil.copytree(BENCHMARKS / name, tmp_path / name)
    return tmp_path


def all_of(directory):
    """The text of all pages."""
    return "\n".join(path.read_text() for path in sorted(directory.glob("pages/*.md")))


def other(value, factors):
    """The same results with other numbers, each by a factor of its own so that ratios change too.

    Whole numbers are keys and counts, and stay, unless they are as large as bytes.
    """
    if isinstance(value, dict):
        return {key: other(one, factors) for key, one in value.items()}
    if isinstance(value, list):
        return [other(one, factors) for one in value]
    if isinstance(value, int) and value > 1_000_000:
        return int(value * next(factors))
    return value * next(factors) + 0.1 if isinstance(value, float) else value


def with_other_numbers(directory, seed=0):
    # Of a whole range: with a few factors, some ratio of two numbers would stay as it is.
    rng = random.Random(seed)
    factors = iter(lambda: rng.uniform(2, 17), None)
    for path in sorted((directory / "results").glob("*.json")):
        found = other(json.loads(path.read_text()), factors)
        path.write_text(json.dumps(found))


def cells(text):
    """Of all tables in regions but for their headers and first columns."""
    found = re.findall(r"<!-- table: .*? -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return [
        cell.strip()
        for table in found for line in table.splitlines()[2:] for cell in line.split("|")[2:-1]
    ]  # fmt: skip


def test_the_committed_pages_are_what_the_committed_results_say():
    result = tables(BENCHMARKS, "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(TABLES) >= 11 and len(set(TABLES)) == len(TABLES)
    # No table of results but in regions, and all plots are shown.
    others = [BENCHMARKS / "README.md", *BENCHMARKS.glob("notes/*.md")]
    every = "\n".join([ALL, *(path.read_text(encoding="utf-8") for path in others)])
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", every, flags=re.DOTALL)
    assert not re.search(r"^\|", outside, re.MULTILINE)
    assert sorted(re.findall(r"!\[.+\]\(../plots/(.+)\)", ALL)) == PLOTS


@pytest.mark.slow
def test_other_results_give_other_tables_and_back(page):
    before = contents(page)
    with_other_numbers(page)
    changed = contents(page)
    result = tables(page, "--check")
    assert (result.returncode, result.stderr) == (1, "")
    names = [f"table {name}" for name in TABLES] + [f"plots/{name}" for name in PLOTS]
    assert result.stdout.splitlines() == [f"{name}: not what the results say" for name in names]
    assert contents(page) == changed

    result = tables(page)
    assert (result.returncode, result.stdout.splitlines()) == (0, [f"{n}: written" for n in names])
    assert tables(page, "--check").returncode == 0
    first = cells(all_of(page))
    shutil.copytree(BENCHMARKS / "results", page / "results", dirs_exist_ok=True)
    with_other_numbers(page, seed=1)
    assert tables(page).returncode == 0
    # No number with a decimal point stays: none is typed into the code but goals. One of a few
    # digits may stay by chance, but not twice.
    rows = list(zip(cells(ALL), first, cells(all_of(page)), strict=True))
    assert len(rows) > 200
    assert {a for a, b, c in rows if a == b == c and re.search(r"\d\.\d", a)} == CONSTANTS

    shutil.copytree(BENCHMARKS / "results", page / "results", dirs_exist_ok=True)
    assert tables(page).returncode == 0
    after = contents(page)
    assert {p: b for p, b in after.items() if p.suffix != ".svg"} == {
        p: b for p, b in before.items() if p.suffix != ".svg"
    }
    assert tables(page, "--check").returncode == 0


@pytest.mark.slow
def test_a_number_typed_by_hand_is_found_and_prose_is_left(page):
    path, before = page / "pages" / "engine.md", PAGES["engine.md"]
    text, n = re.subn(r"(\| d2c-mlx, tokens/s \| \d+)", r"\g<1>0", before)
    assert n == 1
    path.write_text(text + "Prose of today.\n", encoding="utf-8")
    (page / "plots" / "slots.svg").unlink()
    result = tables(page, "--check")
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        f"{name}: not what the results say" for name in ("table probe", "plots/slots.svg")
    ]
    assert tables(page).returncode == 0
    assert path.read_text(encoding="utf-8") == before + "Prose of today.\n"
    # Made by whichever matplotlib is here, twice the same bytes.
    plot = (page / "plots" / "slots.svg").read_bytes()
    (page / "plots" / "slots.svg").unlink()
    tables(page)
    assert (page / "plots" / "slots.svg").read_bytes() == plot


# Page, what stands there, what shall, and words of the error.
BROKEN = {
    "unknown": ("slots", "<!-- table: slots -->", "<!-- table: slits -->",
                "no table slits; there are: pro"),
    "no end": ("phone", "<!-- end -->\n\nThe 4-bit", "\nThe 4-bit",
               "phone has no <!-- end --> before"),
    "no end at all": ("slots", None, "<!-- table: slots -->\n", "region slots has no <!-- end -->"),
    "no region": ("slots", None, "<!-- end -->\n", "<!-- end --> without a region"),
}  # fmt: skip


def refused(page, words):
    before = contents(page)
    for options in ((), ("--check",)):
        result = tables(page, *options)
        assert (result.returncode, result.stdout) == (1, "")
        assert words in result.stderr and result.stderr.count("\n") == 1
    assert contents(page) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_region_is_an_error_in_one_line(page, name):
    file, old, new, words = BROKEN[name]
    before = PAGES[f"{file}.md"]
    text = before.replace(old, new) if old else before + new
    assert text != before
    (page / "pages" / f"{file}.md").write_text(text, encoding="utf-8")
    # Another page has a number typed by hand, which is left as well.
    typed = PAGES["engine.md"].replace("| d2c-mlx, tokens/s | ", "| d2c-mlx, tokens/s | 1")
    (page / "pages" / "engine.md").write_text(typed, encoding="utf-8")
    refused(page, words)
    if name != "no end at all":
        # With the number of the line.
        assert re.search(rf"{file}\.md:\d+: ", tables(page).stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes-strong", "switch", "slots"])
def test_missing_and_broken_results_are_errors_in_one_line(page, name):
    path = page / "results" / f"{name}.json"
    path.write_text(path.read_text()[:-100])
    refused(page, f"{path}: not JSON")
    path.unlink()
    refused(page, f"{path}: no such file")


def test_the_table_of_new_tasks_is_the_mean_of_its_rows():
    def row(task, **excess):
        parts = {name: {"loss": 1 + x, "excess": x, "chrf": None, "seconds": 2.0}
                 for name, x in excess.items()}  # fmt: skip
        return {"task": task, "draw": 0, "auto": "top", "seconds": 9.0, "methods": parts}

    first = row("a", real=0, base=1, top=0.25, fresh=0.5)
    rows = [first, row("b", real=0, base=2, top=1, fresh=0.8)]
    table = packs.compose({"compose": {"rows": rows}}.__getitem__)
    assert table[2:] == [
        "| real | 0.000 | 100% |  | 2 of 2 | 2 |",
        "| best of auto's, in hindsight | 0.525 | 68% |  | 1 of 2 | 2 |",
        "| top | 0.625 | 62% |  | 1 of 2 | 2 |",
        "| auto | 0.625 | 62% |  | 1 of 2 | 9 |",
        "| fresh | 0.650 | 55% |  |  | 2 |",
        "| base | 1.500 | 0% |  | 0 of 2 | 2 |",
    ]
    assert packs.compose_tasks({"compose": {"rows": rows}}.__getitem__)[2:] == [
        "| a | 0 | 1.000 |  |  | 0.500 | 0.250 | top |",
        "| b | 0 | 2.000 |  |  | 0.800 | 1.000 | top |",
    ]
