"""The chat page of a server, in a browser, on a pack that answers."""

import re
import time

import pytest
from helpers.browser import axe_finds, tabbed
from helpers.served import get, idle, raw, serving, text

from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.scheduler import Limits

pytestmark = pytest.mark.slow
PROMPT = "the quick brown fox"
FACTS = re.compile(r"(\d+) tokens?(, [\d.]+ tokens/s)?, first after [\d.]+ s(, cut off .+)?")


@pytest.fixture(scope="module")
def server(pack, model_path):
    with serving(pack, model_path, limits=Limits(max_tokens=24)) as running:
        yield running


def origin(server):
    return server.url.removesuffix("v1")


def ask(page, first=None, second=None, prompt=PROMPT):
    """Send a prompt with Enter; returns the cards of its answers when they are there."""
    page.locator("#send:enabled").wait_for()
    for name, value in (("first", first), ("second", second)):
        if value is not None:
            page.select_option(f"#{name}", value)
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    page.locator("#send:enabled").wait_for()
    return page.locator(".turn").last.locator("article").all()


def parts(card):
    """Name, answer, and number of tokens of a card."""
    facts = FACTS.fullmatch(card.locator("p").last.inner_text())
    return card.locator("h3").inner_text(), card.locator(".text").inner_text(), int(facts[1])


def test_two_tasks_answer_one_prompt_and_auto_routes(server, opened, answer):
    page = opened(origin(server))
    cards = [parts(card) for card in ask(page, "wide", "model")]
    assert cards[0][1] != cards[1][1]
    for name, task, (shown, words, n) in zip(("wide", "model"), ("wide", None), cards, strict=True):
        expected = text(answer, task, PROMPT, n, chat=True)
        assert shown == name and words.split() == (expected or "(nothing)").split()
        # For screen readers, once it is whole.
        assert words.split()[0] in page.locator("#said").inner_text()
    tasks = [*server.service.pack.tasks]
    names = page.locator("#first option").all_inner_texts()
    assert names == ["auto (routed)", *tasks, "model (base model)"]
    assert page.locator("#base").inner_text() == f"{len(tasks)} tasks on model"
    page.select_option("#second", index=0)
    card, *_ = ask(page, "auto")
    words, name = card.locator("p").first.inner_text(), card.locator("h3").inner_text()
    assert re.search(r"auto(: the base| chose) .*similarity -?[01]\.\d\d[.;] ", words)
    assert ("chose" in words) == (name != "model") and name in (*tasks, "model")


def test_earlier_turns_are_sent_if_asked_for(server, opened):
    page = opened(origin(server))
    bodies = []
    page.on("request", lambda request: request.post_data and bodies.append(request.post_data_json))
    (card,) = ask(page, "late")
    assert card.locator("p").first.is_hidden() and card.locator("h3").inner_text() == "late"
    answer = card.locator(".text").inner_text()
    ask(page)
    page.check("#more")
    ask(page, prompt="and lazy dogs")
    assert [[turn["role"] for turn in body["messages"]] for body in bodies] == [
        ["user"], ["user"], ["user", "assistant", "user", "assistant", "user"],
    ]  # fmt: skip
    assert bodies[2]["messages"][1]["content"].split() == answer.split()
    page.click("#clear")
    ask(page)
    assert len(bodies[3]["messages"]) == 1 and page.locator(".turn").count() == 1


def test_stop(packs, model_path, opened, monkeypatch):
    whole = Adapters.__call__
    # As slow as a model that has something to say.
    slow = lambda *args, **options: time.sleep(0.02) or whole(*args, **options)  # noqa: E731
    monkeypatch.setattr(Adapters, "__call__", slow)
    with serving(packs["plain"], model_path) as talkative:
        page = opened(origin(talkative))
        page.select_option("#second", "wide")
        for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
            page.fill("#prompt", PROMPT)
            page.keyboard.press("Enter")
            page.locator("#stop:enabled").wait_for()
            stop()
            page.locator("#send:enabled").wait_for()
            for card in page.locator(".turn").last.locator("article").all():
                assert card.locator("p").last.inner_text() == "stopped"
            # The focus is where one writes, and nothing is generated for nobody.
            assert page.evaluate("document.activeElement.id") == "prompt"
            idle(talkative)


def test_a_prompt_is_no_markup_and_what_is_refused_is_said(server, opened):
    page = opened(origin(server))
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    ask(page, "late", prompt=evil)
    assert page.locator(".mine").inner_text() == evil
    assert page.title() == "d2c-mlx chat" and page.locator("main img").count() == 0
    (card,) = ask(page, "late", prompt="fox " * 600)
    assert "the model's context of 512 is too short" in card.locator(".bad").inner_text()
    assert opened.wrong.pop().startswith("Failed to load resource")


def test_the_token_is_typed_into_the_page(pack, model_path, opened):
    with serving(pack, model_path, token="secret") as locked:
        page = opened(origin(locked))
        for typed in ("wrong", "secret"):
            page.locator("#key").wait_for()
            assert page.locator("#send").is_disabled()
            page.fill("#key", typed)
            page.keyboard.press("Enter")
            if typed == "wrong":
                page.get_by_text("The server refused this token.").wait_for()
        assert parts(*ask(page, "late"))[0] == "late" and page.locator("#token").is_hidden()
        # It is kept nowhere.
        assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
        assert page.context.cookies() == []
        # The browser itself says what status it got.
        statuses = [opened.wrong.pop() for _ in range(2)]
        assert all("401" in line for line in statuses)


def test_the_page_asks_nobody_else(server):
    head, page = raw(server, get("/")).decode().split("\r\n\r\n", 1)
    assert "content-type: text/html; charset=utf-8" in head
    policy = head.partition("content-security-policy: ")[2].splitlines()[0]
    assert "default-src 'none'; connect-src 'self';" in policy and "unsafe" not in policy
    assert not re.search(r"https?:", page)


@pytest.mark.parametrize(("width", "theme"), [(400, "light"), (1400, "dark")])
def test_for_everyone(server, opened, width, theme):
    """On a phone, in the dark, and by keyboard alone."""
    page = opened(origin(server), width, theme)
    cards = ask(page, "auto", "wide")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert axe_finds(page) == []
    # Side by side where there is room.
    first, second = (card.bounding_box() for card in cards)
    assert (first["y"] == second["y"]) == (width == 1400)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", colour)[0]) > 127) == (theme == "light")
    assert page.locator("#prompt").bounding_box()["y"] < 900
    page.click("h1")
    reached = tabbed(page)
    stops = page.locator("select, textarea, input:visible, button:visible:enabled").all()
    assert reached == [int(stop.get_attribute("data-stop")) for stop in stops] and len(reached) == 6
    page.focus("#prompt")
    page.keyboard.type("the fox")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and dogs")
    assert page.input_value("#prompt") == "the fox\nand dogs"
