"""What tests of pages ask of a browser; the fixture `browser` starts it."""

import pytest


def tabbed(page):
    """What Tab reaches, in its order, with the number that each got in the page."""
    page.evaluate(
        "document.querySelectorAll('[tabindex], input, select, textarea, button, summary, a')"
        ".forEach((one, i) => one.dataset.stop = i)"
    )
    found = []
    for _ in range(300):
        page.keyboard.press("Tab")
        stop = page.evaluate("document.activeElement.dataset.stop || null")
        if stop is None:
            break
        found.append(int(stop))
    return found


def axe_finds(page):
    """Rules of axe that the page breaks; more than 20 must have been applied."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs: pip install axe-playwright-python"
    )
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20
    return [one["id"] for one in found["violations"]]
