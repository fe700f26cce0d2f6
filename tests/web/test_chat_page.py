"""The chat page of a server, in a browser, on a pack that answers."""

import http.client
import re
from contextlib import closing

import pytest
from helpers.browser import axe_finds, tabbed
from helpers.served import idle, serving, text

from d2c_mlx.serve.scheduler import Limits

pytestmark = pytest.mark.slow
PROMPT = "the quick brown fox"
FACTS = re.compile(r"(\d+) tokens?(, [\d.]+ tokens/s)?, first after [\d.]+ s(, cut off .+)?")


def get(server, path="/", **headers):
    with closing(http.client.HTTPConnection(*server.address)) as connection:
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()


@pytest.fixture(scope="module")
def server(pack, model_path):
    with serving(pack, model_path, limits=Limits(max_tokens=24)) as one:
        yield one


@pytest.fixture
def opened(browser):
    """`opened(server)`: its page; at the end no page has said or asked for what it should not."""
    pages, wrong = [], []

    def go(server, width=1400, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        origin = server.url.removesuffix("v1")
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(origin) or wrong.append(asked.url))
        pages.append(page)
        page.goto(origin)
        return page

    go.wrong = wrong
    yield go
    for page in pages:
        page.close()
    assert wrong == []


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


def test_two_tasks_answer_one_prompt(server, opened, answer):
    page = opened(server)
    found = [parts(card) for card in ask(page, "wide", "model")]
    assert [name for name, *_ in found] == ["wide", "model"]
    for name, said, n in zip(("wide", None), (x[1] for x in found), (x[2] for x in found)):
        wanted = text(answer, name, PROMPT, n, chat=True)
        assert said.split() == (wanted or "(nothing)").split()
        # For screen readers, once it is whole.
        assert said.split()[0] in page.locator("#said").inner_text()
    assert found[0][1] != found[1][1]


def test_what_was_routed_and_how_sure(server, opened):
    page = opened(server)
    page.locator("#send:enabled").wait_for()
    names = page.locator("#first option").all_inner_texts()
    tasks = [*server.service.pack.tasks]
    assert names == ["auto (routed)", *tasks, "model (base model)"]
    assert page.locator("#base").inner_text() == f"{len(tasks)} tasks on model"
    (card,) = ask(page, "auto")
    words = card.locator("p").first.inner_text()
    name = card.locator("h3").inner_text()
    reply = get(server, "/v1/models")
    assert name in reply[2]
    assert re.search(r"auto(: the base| chose) .*similarity -?[01]\.\d\d[.;] ", words)
    assert ("chose" in words) == (name != "model")
    (card,) = ask(page, "late")
    assert card.locator("p").first.is_hidden() and card.locator("h3").inner_text() == "late"


def test_earlier_turns_are_sent_if_asked_for(server, opened):
    page = opened(server)
    bodies = []
    page.on("request", lambda one: one.post_data and bodies.append(one.post_data_json))
    (card,) = ask(page, "late")
    said = card.locator(".text").inner_text()
    ask(page)
    page.check("#more")
    ask(page, prompt="and lazy dogs")
    assert [[one["role"] for one in body["messages"]] for body in bodies] == [
        ["user"], ["user"], ["user", "assistant", "user", "assistant", "user"],
    ]  # fmt: skip
    assert bodies[2]["messages"][1]["content"].split() == said.split()
    page.click("#clear")
    ask(page)
    assert len(bodies[3]["messages"]) == 1 and page.locator(".turn").count() == 1


def test_stop(packs, model_path, opened):
    with serving(packs["plain"], model_path) as talkative:
        page = opened(talkative)
        page.select_option("#second", "wide")
        for how in ("click", "Escape"):
            page.locator("#send:enabled").wait_for()
            page.fill("#prompt", PROMPT)
            page.keyboard.press("Enter")
            page.locator("#stop:enabled").wait_for()
            page.click("#stop") if how == "click" else page.keyboard.press(how)
            page.locator("#send:enabled").wait_for()
            for card in page.locator(".turn").last.locator("article").all():
                assert card.locator("p").last.inner_text() == "stopped"
            # The focus is where one writes, and nothing is generated for nobody.
            assert page.evaluate("document.activeElement.id") == "prompt"
            idle(talkative)


def test_a_prompt_is_no_markup(server, opened):
    page = opened(server)
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    ask(page, "late", prompt=evil)
    assert page.locator(".mine").inner_text() == evil
    assert page.title() == "d2c-mlx chat" and page.locator("main img").count() == 0


def test_what_the_server_refuses_is_said(server, opened):
    page = opened(server)
    page.locator("#send:enabled").wait_for()
    (card,) = ask(page, "late", prompt="fox " * 600)
    assert "the model's context of 512 is too short" in card.locator(".bad").inner_text()
    assert opened.wrong.pop().startswith("Failed to load resource")


def test_the_token_is_typed_into_the_page(pack, model_path, opened):
    with serving(pack, model_path, token="secret") as locked:
        page = opened(locked)
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
        page.reload()
        page.locator("#key").wait_for()
        # The browser itself says what status it got.
        assert len(opened.wrong) == 3 and all("401" in one for one in opened.wrong)
        opened.wrong.clear()


def test_headers_and_who_may_open_it(server, pack, model_path):
    status, headers, page = get(server)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; connect-src 'self';" in policy and "unsafe" not in policy
    assert not re.search(r"https?:", page)
    assert get(server, Host="evil.example")[0] == 400
    # A request of the page itself has its origin; pages of other ports are others.
    host, port = server.address
    assert get(server, "/v1/models", Origin=f"http://{host}:{port}")[0] == 200
    assert get(server, "/v1/models", Origin=f"http://{host}:{port + 1}")[0] == 403


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_for_everyone(server, opened, width, theme, tmp_path):
    page = opened(server, width, theme)
    cards = ask(page, "auto", "wide")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert axe_finds(page) == []
    # Side by side where there is room.
    first, second = (card.bounding_box() for card in cards)
    assert (first["y"] == second["y"]) == (width == 1400)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", colour)[0]) > 127) == (theme == "light")
    assert page.locator("#prompt").bounding_box()["y"] < 900
    page.screenshot(path=tmp_path / "chat.png")


def test_by_keyboard_alone(server, opened):
    page = opened(server)
    ask(page, "late")
    page.click("h1")
    reached = tabbed(page)
    stops = page.locator("select, textarea, input:visible, button:visible:enabled").all()
    assert reached == [int(one.get_attribute("data-stop")) for one in stops] and len(reached) == 6
    page.focus("#prompt")
    page.keyboard.type("the fox")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and dogs")
    assert page.input_value("#prompt") == "the fox\nand dogs"
