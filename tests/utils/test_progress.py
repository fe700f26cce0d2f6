"""What a progress bar shows."""

from d2c_mlx.utils.progress import Progress


def test_a_bar_grows_with_the_work_and_has_no_colour_where_none_is_wanted(monkeypatch, capsys):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    progress = Progress(shown=True)
    with progress.section("probe"):
        progress.expect(10)
        progress.expect(5)
        progress.advance(15)
    text = capsys.readouterr().err
    assert "probe" in text and "15/15 tokens" in text
    assert "\x1b[3" not in text.replace("\x1b[3m", "")


def test_nothing_is_shown_unasked_without_a_terminal_or_outside_a_section(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for progress in (Progress(), Progress(shown=True)):
        progress.expect(10)
        with progress.section("probe"):
            progress.expect(10)
            progress.advance(10)
    assert not progress.shown and capsys.readouterr().err == ""
