"""What a progress bar shows as the work to come."""

from rich.progress import Progress

from d2c_mlx.progress import Bar


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
