"""What a progress bar shows as the work to come."""

import re
import time

from helpers.tiny import library
from rich.progress import Progress

from d2c_mlx.cluster.measured_search import search_by_estimates
from d2c_mlx.evaluate.evaluator import Silent
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.progress import Bar, progress_bar


def test_what_is_foreseen_becomes_known():
    progress = Progress(disable=True)
    task = progress.add_task("plan", total=0, visible=False)
    bar = Bar(progress, task)
    shown = progress.tasks[0]
    bar.foresee(0)
    assert not shown.visible
    bar.expect(10)
    assert (shown.total, shown.visible) == (10, True)
    bar.foresee(100)
    assert shown.total == 110
    bar.expect(30)
    bar.advance(40)
    assert (shown.total, shown.completed) == (110, 40)
    # Less is to come than was foreseen, then more.
    bar.foresee(20)
    assert shown.total == 60
    bar.expect(50)
    assert shown.total == 90
    bar.foresee(0)
    bar.advance(50)
    assert shown.total == shown.completed == 90


def test_the_time_left_of_clustering_is_foreseen(tmp_path, monkeypatch):
    """By tokens, to a factor of three; nothing is left in the end."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cold"))
    paths = library(tmp_path, ["a", "b", "c", "d", "e"])
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="2", output=str(tmp_path / "run"), probe_examples=3, test_examples=2,
    )  # fmt: skip
    session = run(config, until="probe", quiet=True)
    seen, before = [], session.evaluator.counts.tokens
    meter = session.evaluator.meter = Silent()
    meter.foresee = seen.append
    search_by_estimates(session.study.problem, 2, seed=0, eps=1e-3)
    done = session.evaluator.counts.tokens - before
    assert seen[0] / 3 <= done <= 3 * seen[0]
    assert seen[-1] == 0 and all(n > 0 for n in seen[:-1])


def test_without_a_terminal_there_are_lines(capsys):
    """As many as there is time for; the test waits for one, and for the end."""
    with progress_bar("probe", every=0.001) as bar:
        bar.expect(2000)
        bar.advance(500)
        said = ""
        for _ in range(600):
            said += capsys.readouterr().err
            if re.search(r"500 of 2,000 tokens, \d:\d\d:\d\d", said):
                break
            time.sleep(0.1)
        assert "500 of 2,000 tokens" in said
    assert all(line.startswith("probe: ") for line in said.splitlines())
    assert capsys.readouterr().err.splitlines()[-1].startswith("probe: done, 0:")
    with progress_bar("probe", quiet=True, every=0.001) as bar:
        bar.expect(10)
    assert capsys.readouterr().err == ""


def test_a_bar_has_no_colour_where_none_is_wanted(monkeypatch, capsys):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with progress_bar("probe") as bar:
        bar.expect(10)
        bar.advance(10)
    text = capsys.readouterr().err
    assert "probe" in text and "\x1b[3" not in text.replace("\x1b[3m", "")
