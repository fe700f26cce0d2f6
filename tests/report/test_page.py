"""The report in a browser: every size and theme, by keyboard, on paper."""

import html
import re

import pytest
from helpers.browser import axe_finds, tabbed
from helpers.runs import artifacts_of

from d2c_mlx.report.report import render_html

pytestmark = pytest.mark.slow


@pytest.fixture
def opened(request, runs):
    """The run whose report is opened: `--report DIR`, or the tiny one of a kind."""
    return lambda kind: (request.config.getoption("--report") or runs[kind]).resolve()


MISSING = """() => [
  ...document.querySelectorAll('img:not([alt]), [role=img]:not([aria-label])'),
  ...document.querySelectorAll('svg:not([aria-hidden=true])'),
  ...document.querySelectorAll('.wide:not([tabindex="0"][role=region][aria-label])'),
  ...document.querySelectorAll('th:not([scope])'),
  ...[...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(a.hash)),
].map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize(
    ("kind", "width", "theme"),
    [("d2c", 400, "light"), ("auto", 400, "dark"), ("auto", 1400, "light"), ("d2c", 1400, "dark")],
)
def test_in_a_browser(opened, browser, kind, width, theme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((opened(kind) / "report.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert messages == [] and len(requests) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(MISSING) == []
    # Two columns where there is room, one on a phone; the worst task begins on the first screen.
    left = page.locator("main h2").evaluate_all("all => all.map(h => h.getBoundingClientRect().x)")
    assert (max(left) > width / 2) == (width == 1400)
    assert page.locator(".card").first.bounding_box()["y"] < 900
    # The theme reaches the text of the page and of its charts.
    for place, style in (("body", "color"), ("figure svg text", "fill")):
        color = page.locator(place).first.evaluate(f"e => getComputedStyle(e).{style}")
        assert (int(re.findall(r"\d+", color)[0]) > 127) == (theme == "dark")
    if width == 400:
        assert axe_finds(page) == []
    page.close()


def test_by_keyboard_alone(runs, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((runs["auto"] / "report.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    reached = tabbed(page)
    assert reached == list(range(len(reached)))
    stops = page.locator("input, summary, a, .wide")
    assert reached == sorted(int(stop.get_attribute("data-stop")) for stop in stops.all())
    page.close()


def test_an_answer_runs_no_script(runs, browser, tmp_path):
    """Escaped, and where escaping should fail one day, forbidden by the policy of the page."""
    evil = "<script>document.title = 'evil'</script><img src=x onerror=document.title=1>"
    artifacts = artifacts_of(runs["d2c"])
    for rows in artifacts["bench"]["answers"].values():
        rows[0]["pack"] = evil
    text = render_html(artifacts)
    assert evil not in text and evil in html.unescape(text)
    for name, content in (("escaped", text), ("raw", text.replace("<main>", f"<main>{evil}"))):
        path = tmp_path / f"{name}.html"
        path.write_text(content)
        page = browser.new_page()
        page.goto(path.as_uri())
        assert page.title().startswith("d2c-mlx: ")
        page.close()


def test_printed_on_paper(opened, browser, tmp_path):
    page = browser.new_page()
    page.goto((opened("auto") / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # The width of A4 within margins of a centimetre; nothing can be scrolled on paper.
    page.set_viewport_size({"width": 718, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.locator(".dial").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    page.close()
