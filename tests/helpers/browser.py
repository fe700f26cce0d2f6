"""What tests of pages ask of a browser; the fixture `browser` starts it."""

import pytest


def tabbed(page):
    """What Tab reaches, in its order, with the number that each got in the page."""
    page.evaluate(
        "document.querySelectorAll('[tabindex], input, select, textarea, button, summary, a')"
        ".forEach((one, i) => one.dataset.stop = i)"
    )
    stops = []
    for _ in range(300):
        page.keyboard.press("Tab")
        stop = page.evaluate("document.activeElement.dataset.stop || null")
        if stop is None:
            break
        stops.append(int(stop))
    return stops


def axe_finds(page):
    """Rules of axe that the page breaks; more than 20 must have been applied."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs: pip install axe-playwright-python"
    )
    response = axe.Axe().run(page).response
    assert len(response["passes"]) > 20
    return [violation["id"] for violation in response["violations"]]
