"""The report: every number is one of the JSON files', every text is shown as it is, to everyone."""

import html
import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.browser import axe_finds, tabbed
from helpers.runs import artifacts_of
from mlx_lm import load, stream_generate
from scipy.stats import binomtest

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.phone.tables import render_phone
from d2c_mlx.report.report import render_html
from d2c_mlx.utils.errors import printable
from d2c_mlx.utils.templates import markdown

pytestmark = pytest.mark.slow

TEMPLATES = Path(render_html.__code__.co_filename).parent
NUMBER = re.compile(r"(?<![\w-])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?")


def leaves(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
        # Lengths are counted, keys are names.
        yield len(value)
        yield from value if isinstance(value, dict) else ()
    elif value is not None and not isinstance(value, bool):
        yield value


def forms(x):
    """The ways in which the report writes a number."""
    forms = {str(x), f"{100 * x:.1f}%", f"{100 * x:.2f}%", f"{1000 * x:,.1f}", f"{x / 1e6:,.2f}"}
    forms |= {f"{x:.{digits}f}" for digits in (1, 2, 3, 4)}
    forms |= {f"{x / unit:.3g}" for unit in (1, 1e3, 1e6, 1e9)}
    return forms | ({f"{x:,}"} if isinstance(x, int) else set())


def unexplained(text, artifacts, template):
    """Numbers of the text that no JSON value explains, nor the words of the template."""
    values = list(leaves(artifacts))
    for word in sorted({v for v in values if isinstance(v, str)}, key=len, reverse=True):
        if any(c.isdigit() for c in word):
            # A hash is cut; white space is folded; addresses are escaped in Markdown.
            folded = " ".join(word.split())
            for form in (word, folded, markdown(folded), word[:12]):
                text = re.sub(rf"(?<![\w.,-]){re.escape(form)}(?!\w|[.,]\d)", " ", text)
    numbers = [v for v in values if not isinstance(v, str)]
    total = artifacts["bench"]["methods"]["individual"]["nbytes"]
    shares = [method["nbytes"] / total for method in artifacts["bench"]["methods"].values()]
    rows = [row for rows in artifacts["bench"]["answers"].values() for row in rows]
    right = sum(row["pack"].lower().split() == row["expected"].lower().split() for row in rows)
    low, high = binomtest(right, len(rows)).proportion_ci(method="wilson")
    interval = low, high, low + 1e-4, high + 1e-4  # ours rounds 1.96
    allowed = {form for x in (*numbers, *shares, *interval) for form in forms(x)}
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", (TEMPLATES / template).read_text())
    allowed |= set(NUMBER.findall(words)) | {str(i) for i in range(10)} | {"95%"}
    return sorted({n for n in NUMBER.findall(text) if n.rstrip(",") not in allowed})


def words_of(page):
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_every_number_comes_from_the_json_files(directory):
    artifacts = artifacts_of(directory)
    page = words_of(render_html(artifacts))
    assert len(NUMBER.findall(page)) > 80
    assert unexplained(page, artifacts, "report.html.jinja") == []
    # And a number of none of them is noticed.
    assert unexplained(f"{page} 0.31415", artifacts, "report.html.jinja") == ["0.31415"]
    # The answer comes first, and tasks worst first.
    bench = artifacts["bench"]["methods"]
    page = (directory / "report.html").read_text()
    first = words_of(page[page.index("<h1>") : page.index("<h2>")])
    assert "4 adapters in" in first and f"{bench['pack']['excess']:.4f} nats" in first
    assert "As on 14 devices" in page and "<dt>KV cache, peak</dt>" in page
    assert page.count("held-out loss</text>") == 1
    table = page[page.index("Tasks, worst first") :]
    names = re.findall(r'<th scope="row" class="name" dir="auto">(\w)</th>', table)[:4]
    assert names == sorted("abcd", key=lambda name: -bench["pack"]["tasks"][name]["excess"])


def test_answers_are_those_of_stock_mlx_lm(runs):
    output = runs["d2c"]
    bench = json.loads((output / "bench.json").read_text())
    pack = load_pack(output / "pack")
    page = html.unescape((output / "report.html").read_text())
    adapter = str(pack.path / pack.tasks["a"])
    model, tokenizer = load(bench["provenance"]["config"]["model"], adapter_path=adapter)
    model.set_dtype(mx.float32)
    rows = (output.parent / "tasks" / "a" / "test.jsonl").read_text().splitlines()[:3]
    for row, shown in zip(map(json.loads, rows), bench["answers"]["a"], strict=True):
        assert (shown["prompt"], shown["expected"]) == (row["prompt"], row["completion"])
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        n = 2 * len(tokenizer.encode(row["completion"], add_special_tokens=False)) + 16
        steps = stream_generate(model, tokenizer, prompt, max_tokens=n + 4)
        answer = tokenizer.decode([step.token for step in steps], skip_special_tokens=True).strip()
        assert shown["pack"] == answer
        assert f'<dt>prompt</dt><dd dir="auto">{row["prompt"]}</dd>' in page
        printed = printable(answer, keep="\n\t") or "(nothing)"
        assert f'<dt>pack</dt><dd dir="auto">{printed}<' in page
    assert bench["answers"]["a"][0]["base"] != bench["answers"]["a"][0]["individual"]


def test_names_are_neither_formulas_nor_markup(directory):
    # Two that matplotlib would take for formulas, of which one is wrong; HTML.
    names = {"a": "us$_$", "b": "a$^$", "c": "x|y", "d": "<i>z"}
    text = json.dumps(artifacts_of(directory))
    artifacts = json.loads(re.sub(r'"([abcd])"', lambda match: json.dumps(names[match[1]]), text))
    artifacts["phone"]["devices"]["phone $^$"] = artifacts["phone"]["devices"]["iphone-6gb"]
    page = render_html(artifacts)
    shown = re.findall(r'<th scope="row" class="name" dir="auto">(.*?)</th>', page)
    assert all(html.escape(name) in shown for name in names.values())
    assert "<i>" not in page


def test_the_example_is_one_that_the_pack_changes(runs):
    artifacts = artifacts_of(runs["d2c"])
    tasks = artifacts["bench"]["methods"]["pack"]["tasks"]
    worst = max(tasks, key=lambda name: tasks[name]["excess"])
    same = {"prompt": "one", "expected": "A b", "base": "x", "individual": "y", "pack": "Y"}
    artifacts["bench"]["answers"][worst] = [same, {**same, "prompt": "<i>", "pack": "a  B"}]
    page = render_html(artifacts)
    card = page[page.index("<article") : page.index("</article>")]
    assert f">{worst}</h3>" in card and ">&lt;i&gt;</dd>" in card and ">one</dd>" not in card
    assert 'a  B<span class="right">as expected</span>' in card and card.count("as expected") == 1
    del artifacts["bench"]["answers"]
    assert "No answers were measured" in render_html(artifacts)


def test_a_pack_that_stores_nothing_and_adapters_that_gain_nothing(runs):
    artifacts = artifacts_of(runs["auto"])
    artifacts["plan"] |= {"units": [], "base": artifacts["losses"]["tasks"]}
    methods = artifacts["bench"]["methods"]
    methods["pack"]["nbytes"] = artifacts["manifest"]["nbytes"] = 0
    for task in methods["pack"]["tasks"].values():
        task["kept"] = 0.0
    page = render_html(artifacts)
    assert "Left to the base model: a, b, c, d." in page and "in 0 adapters" in page
    # Every bar is empty.
    assert {*re.findall(r'<span style="width: (.*?)%">', page)} == {"0.0"}
    for method in methods.values():
        for losses in (method, *method["tasks"].values()):
            losses["kept"] = None
    page = render_html(artifacts)
    assert 'class="dial"' not in page
    assert "None" not in words_of(page)
    # Nor is there anything to exceed where a phone had no task adapters.
    assert set(artifacts["phone"]["quality"]["4"]) == {"base", "auto"}
    assert "| - | - |" in render_phone(artifacts["phone"])


# In a browser: every size and theme, by keyboard, on paper


@pytest.fixture
def report_of(request, runs):
    """The address of a report: of `--report DIR`, or of the tiny run of a kind."""
    run = request.config.getoption("--report")
    return lambda kind: ((run or runs[kind]).resolve() / "report.html").as_uri()


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
def test_in_a_browser(report_of, opened, kind, width, theme):
    page = opened(report_of(kind), width, theme)
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
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
        return
    # By keyboard alone.
    reached, stops = tabbed(page), page.locator("input, summary, a, .wide").all()
    assert reached == list(range(len(reached)))
    assert reached == sorted(int(stop.get_attribute("data-stop")) for stop in stops)


def test_an_answer_runs_no_script(runs, opened, tmp_path):
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
        assert opened(path.as_uri()).title().startswith("d2c-mlx: ")
        # The browser itself says what the policy forbids.
        assert bool(opened.wrong) == (name == "raw")
    opened.wrong.clear()


def test_printed_on_paper(report_of, opened, tmp_path):
    page = opened(report_of("auto"))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # The width of A4 within margins of a centimetre; nothing can be scrolled on paper.
    page.set_viewport_size({"width": 718, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.locator(".dial").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
