"""Models that torch makes in a process of its own, and tables that tests write into a document."""

import os
import subprocess
import sys

from helpers import ROOT

FAMILIES_DOC = ROOT / "docs" / "reference" / "families.md"


def run_with_torch(script, path):
    """Run a script of this folder, which imports torch, on a directory.

    Models are tiny: torch's threads would only wait for each other.
    """
    program = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "helpers" / script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    subprocess.run([*program, str(path)], check=True, capture_output=True, env=environment)


def table(*rows):
    """A table in Markdown; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def check_table(test, text):
    """What families.md has of a test is this text; D2C_MLX_WRITE_DOCS=1 writes it."""
    start, end = f"<!-- table: {test} -->\n", "<!-- end -->\n"
    page = FAMILIES_DOC.read_text(encoding="utf-8")
    head, rest = page.split(start)
    expected = head + start + text + end + rest.split(end, 1)[1]
    if os.environ.get("D2C_MLX_WRITE_DOCS"):
        FAMILIES_DOC.write_text(expected, encoding="utf-8")
        return
    assert page == expected, f"D2C_MLX_WRITE_DOCS=1 pytest {test} writes the table"
