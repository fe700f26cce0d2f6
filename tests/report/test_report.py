"""The report: every number is one of the JSON files', and a browser shows it to everyone."""

import html
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.browser import axe_finds, tabbed
from helpers.tiny import library
from mlx_lm import load, stream_generate

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.phone.benchmark import bench_phone
from d2c_mlx.phone.config import PhoneConfig
from d2c_mlx.pipeline import run
from d2c_mlx.report.report import render_html, render_markdown
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import PackError, printable
from d2c_mlx.utils.templates import markdown

pytestmark = pytest.mark.slow

TEMPLATES = Path(render_html.__code__.co_filename).parent
NUMBER = re.compile(r"(?<![\w-])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind of plan -> run directory; one with merges, one planned in bytes, both measured."""
    root = tmp_path_factory.mktemp("report")
    paths = library(root, ["a", "b", "c", "d"])
    common = RunConfig(model=str(paths.model), adapters=str(paths.adapters), output="x",
                       tasks=str(paths.tasks), probe_examples=3, test_examples=3,
                       answers=2)  # fmt: skip
    found = {}
    for kind, budget in (("d2c", "2"), ("auto", "60%")):
        output = root / kind
        config = common.replace(budget=budget, output=str(output))
        run(config, quiet=True)
        phone = PhoneConfig(pack=str(output / "pack"), device="iphone-6gb", model=str(paths.model),
                            bits=4, contexts=(8,), decode=2, runs=1)  # fmt: skip
        phone = bench_phone(phone.replace(tasks=str(paths.tasks), test_examples=2), quiet=True)
        (output / "phone.json").write_text(json.dumps(phone))
        run(config, quiet=True)
        found[kind] = output
    return found


@pytest.fixture(params=["d2c", "auto"])
def directory(runs, request):
    return runs[request.param]


def artifacts_of(directory):
    names = [name for name in ("losses", "bench", "clusters", "merges", "plan", "phone")
             if (directory / f"{name}.json").exists()]  # fmt: skip
    found = {name: json.loads((directory / f"{name}.json").read_text()) for name in names}
    return {**found, "manifest": json.loads((directory / "pack" / "manifest.json").read_text())}


def leaves(value):
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
        # Lengths are counted, keys are names.
        yield len(value)
        yield from value if isinstance(value, dict) else ()
    elif value is not None and not isinstance(value, bool):
        yield value


def forms(x):
    """The ways in which the report writes a number."""
    found = {str(x), f"{x:.4f}", f"{x:.3f}", f"{x:.2f}", f"{x:.1f}", f"{100 * x:.1f}%",
             f"{100 * x:.2f}%", f"{1000 * x:,.1f}", f"{x / 1e6:,.2f}"}  # fmt: skip
    found |= {f"{x / unit:.3g}" for unit in (1, 1e3, 1e6, 1e9)}
    return found | ({f"{x:,}"} if isinstance(x, int) else set())


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
    allowed = {form for x in (*numbers, *shares) for form in forms(x)}
    words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", (TEMPLATES / template).read_text())
    allowed |= set(NUMBER.findall(words)) | {str(i) for i in range(10)}
    return sorted({n for n in NUMBER.findall(text) if n.rstrip(",") not in allowed})


def words_of(page):
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def shaken(value):
    """The same artifacts with other numbers."""
    if isinstance(value, dict):
        return {key: shaken(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shaken(one) for one in value]
    return 0.83 * value if isinstance(value, float) else value


@pytest.mark.parametrize("change", [lambda x: x, shaken])
def test_every_number_comes_from_the_json_files(directory, change):
    artifacts = change(artifacts_of(directory))
    page = words_of(render_html(artifacts))
    assert len(NUMBER.findall(page)) > 80
    assert unexplained(page, artifacts, "report.html.jinja") == []
    text = render_markdown(artifacts)
    assert unexplained(text, artifacts, "report.md.jinja") == []
    # And a number of none of them is noticed.
    assert unexplained(f"{page} 0.31415", artifacts, "report.html.jinja") == ["0.31415"]


def test_the_answer_comes_first_and_tasks_worst_first(directory):
    bench = artifacts_of(directory)["bench"]["methods"]
    page = (directory / "report.html").read_text()
    first = words_of(page[page.index("<h1>") : page.index("<h2>")])
    assert "4 adapters in" in first and f"{bench['pack']['excess']:.4f} nats" in first
    table = page[page.index("Tasks, worst first") :]
    found = re.findall(r'<th scope="row" class="name" dir="auto">(\w)</th>', table)[:4]
    assert found == sorted("abcd", key=lambda name: -bench["pack"]["tasks"][name]["excess"])


def test_answers_are_those_of_stock_mlx_lm(runs):
    output = runs["d2c"]
    bench = json.loads((output / "bench.json").read_text())
    pack = load_pack(output / "pack")
    page = html.unescape((output / "report.html").read_text())
    for name in "ab":
        adapter = str(pack.adapter_path(name))
        model, tokenizer = load(bench["provenance"]["config"]["model"], adapter_path=adapter)
        model.set_dtype(mx.float32)
        rows = (output.parent / "tasks" / name / "test.jsonl").read_text().splitlines()[:2]
        for row, shown in zip(map(json.loads, rows), bench["answers"][name], strict=True):
            assert (shown["prompt"], shown["expected"]) == (row["prompt"], row["completion"])
            chat = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            n = 2 * len(tokenizer.encode(row["completion"], add_special_tokens=False)) + 16
            steps = stream_generate(model, tokenizer, prompt, max_tokens=n + 4)
            tokens = [step.token for step in steps]
            answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert shown["pack"] == answer
            assert f'<dt>prompt</dt><dd dir="auto">{row["prompt"]}</dd>' in page
            said = printable(answer, keep="\n\t") or "(nothing)"
            assert f'<dt>pack</dt><dd dir="auto">{said}<' in page
    assert bench["answers"]["a"][0]["base"] != bench["answers"]["a"][0]["individual"]


def test_what_was_measured_as_on_a_phone_is_in_both(directory):
    phone = artifacts_of(directory)["phone"]
    assert "As on iphone-6gb" in (directory / "report.html").read_text()
    text = (directory / "report.md").read_text()
    assert "## 4 tasks on model (4 bit), as on iphone-6gb" in text
    assert f"margin {phone['methods']['pack']['memory'][0]['margin'] / 1e6:,.2f} MB" in text


def test_a_measurement_of_another_pack_is_refused(runs, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(runs["d2c"], output)
    shutil.copyfile(runs["auto"] / "phone.json", output / "phone.json")
    config = json.loads((output / "bench.json").read_text())["provenance"]["config"]
    config = RunConfig(**{**config, "output": str(output)})
    with pytest.raises(PackError, match="it is of another pack than .* or delete the file"):
        run(config, quiet=True)


def renamed(value, names):
    """The same artifacts with other names of tasks."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


# Two that matplotlib would take for formulas, of which one is wrong; Markdown's columns, and HTML.
ODD = {"a": "us$_$", "b": "a$^$", "c": "x|y", "d": "<i>z"}


def test_names_are_neither_formulas_nor_markup(directory):
    artifacts = renamed(artifacts_of(directory), ODD)
    phone = artifacts["phone"]
    phone["device"]["name"] = "phone $^$"
    page = render_html(artifacts)
    charts = " ".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    drawn = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", charts)]
    # In the tree as they are, and on both axes of the heatmap.
    assert all(drawn.count(name) == 1 for name in ODD.values())
    heads = re.findall(r'<th scope="(?:col|row)" dir="auto">(.*?)</th>', page)
    assert all(heads.count(html.escape(name)) == 2 for name in ODD.values())
    assert "<i>" not in page
    assert "limit of phone $^$" in drawn
    text = render_markdown(artifacts)
    assert "<i>" not in text and "&lt;i&gt;z" in text and "x\\|y" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for head, line in zip(lines, lines[1:]):
        # The line of dashes has the header's columns, rows have the columns of what is above.
        if text.find(f"{head}\n{line}\n") >= 0:
            assert len(re.split(r"(?<!\\)\|", line)) == len(re.split(r"(?<!\\)\|", head))


def test_the_example_is_one_that_the_pack_changes(runs):
    artifacts = artifacts_of(runs["d2c"])
    worst = max(
        artifacts["bench"]["methods"]["pack"]["tasks"].items(), key=lambda t: t[1]["excess"]
    )
    same = {"prompt": "one", "expected": "A b", "base": "x", "individual": "y", "pack": "Y"}
    changed = {**same, "prompt": "two", "pack": "a  B"}
    artifacts["bench"]["answers"][worst[0]] = [same, changed]
    page = render_html(artifacts)
    card = page[page.index("<article") : page.index("</article>")]
    assert f">{worst[0]}</h3>" in card and ">two</dd>" in card and ">one</dd>" not in card
    assert 'a  B<span class="right">as wanted</span>' in card and card.count("as wanted") == 1
    del artifacts["bench"]["answers"], artifacts["bench"]["metrics"]
    page = render_html(artifacts)
    assert "No answers were measured" in page and "--answers 3" in page


def test_a_pack_that_stores_nothing_and_adapters_that_gain_nothing(runs):
    artifacts = artifacts_of(runs["auto"])
    artifacts["plan"] |= {"units": [], "base": artifacts["losses"]["tasks"]}
    methods = artifacts["bench"]["methods"]
    methods["pack"]["nbytes"] = artifacts["manifest"]["nbytes"] = 0
    page = render_html(artifacts)
    assert "Left to the base model: a, b, c, d." in page and "in 0 adapters" in page
    for method in methods.values():
        for one in (method, *method["tasks"].values()):
            one["retention"] = None
    page = render_html(artifacts)
    assert 'class="dial"' not in page and "None" not in words_of(page)
    assert "None" not in render_markdown(artifacts)


def test_a_run_from_before_there_were_cosines_has_a_report(directory):
    artifacts = artifacts_of(directory)
    del artifacts["losses"]["similarity"]
    assert "How alike" not in render_html(artifacts)


@pytest.fixture
def opened(request, directory):
    """The run whose report is opened: `--report DIR`, or the tiny one of this file."""
    return (request.config.getoption("--report") or directory).resolve()


MISSING = """() => [
  ...document.querySelectorAll('img:not([alt]), [role=img]:not([aria-label])'),
  ...document.querySelectorAll('svg:not([aria-hidden=true])'),
  ...document.querySelectorAll('.wide:not([tabindex="0"][role=region][aria-label])'),
  ...document.querySelectorAll('[data-marks]:not([tabindex="0"][role][aria-label])'),
  ...document.querySelectorAll('th:not([scope])'),
  ...[...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(a.hash)),
].map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(opened, browser, width, theme, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((opened / "report.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert messages == [] and len(requests) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(MISSING) == []
    # Two columns where there is room, one on a phone; the worst task begins on the first screen.
    left = page.locator("main h2").evaluate_all("all => all.map(h => h.getBoundingClientRect().x)")
    assert (max(left) > width / 2) == (width == 1400)
    assert page.locator(".card").first.bounding_box()["y"] < 900
    # The theme reaches the text of the page and of its charts.
    light = page.evaluate(
        "['body', 'figure svg text'].map(s => getComputedStyle(document.querySelector(s)))"
        ".map(s => parseInt((s.fill.match(/\\d+/g)[0] > 0 ? s.fill : s.color).match(/\\d+/)))"
    )
    assert all((value > 127) == (theme == "dark") for value in light)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    page.close()


@pytest.mark.parametrize(("kind", "theme"), [("d2c", "light"), ("auto", "dark")])
def test_axe_finds_nothing(runs, browser, kind, theme, tmp_path):
    artifacts = artifacts_of(runs[kind])
    (tmp_path / "report.html").write_text(render_html(artifacts))
    page = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme=theme)
    page.goto((tmp_path / "report.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    page.locator(".heat tbody td").last.hover()
    assert axe_finds(page) == []
    page.close()


def test_by_keyboard_alone(directory, browser, tmp_path):
    artifacts = artifacts_of(directory)
    (tmp_path / "report.html").write_text(render_html(artifacts))
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    reached = tabbed(page)
    assert reached == list(range(len(reached)))
    stops = page.locator("[data-marks], input, summary, a, .wide")
    assert reached == sorted(int(one.get_attribute("data-stop")) for one in stops.all())
    tip = page.locator("#tip")

    def said(chart, *keys):
        chart.focus()
        for key in keys:
            page.keyboard.press(key)
        return tip.inner_text()

    for figure in page.locator("figure[data-marks]").all():
        for mark in figure.locator(".mark").all():
            assert said(figure, "ArrowRight") == mark.get_attribute("data-say")
    tasks, cosines = artifacts["losses"]["tasks"], artifacts["losses"]["similarity"]
    heat = page.locator(".wide:has(.heat)")
    first = said(heat, "ArrowRight", "ArrowRight")
    i, j = map(tasks.index, re.fullmatch("(.+) and (.+): .+", first).groups())
    assert i != j and first == f"{tasks[i]} and {tasks[j]}: {cosines[i][j]:.3f}"
    assert said(heat, "ArrowDown").split(" and ")[0] != tasks[i]
    assert said(heat, "ArrowRight", "ArrowUp", "ArrowLeft") == first and tip.is_visible()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.close()


def test_the_slider_says_every_budget(directory, browser):
    page = browser.new_page()
    page.goto((directory / "report.html").as_uri())
    slider, rows = page.locator("#budget"), page.locator("section:has(#budget) tbody tr")
    slider.focus()
    page.keyboard.press("Home")
    for k in range(rows.count()):
        cells = rows.nth(k).locator("th, td").all_inner_texts()
        said = page.locator("output").inner_text()
        assert all(cell in said for cell in cells) and "at" in rows.nth(k).get_attribute("class")
        assert slider.get_attribute("aria-valuetext") == said
        page.keyboard.press("ArrowRight")
    page.close()


def test_without_scripts_the_page_is_whole(directory, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((directory / "report.html").as_uri())
    assert page.locator("#budget").is_hidden() and page.locator("#tip").is_hidden()
    assert page.locator("section:has(#budget) table").is_visible()
    # The browser shows these as tooltips.
    assert page.locator("svg .mark > title").count() > 5
    page.context.close()


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
        assert page.locator("#budget").is_visible()  # its own script ran
        page.close()


def test_printed_on_paper(opened, browser, tmp_path):
    page = browser.new_page()
    page.goto((opened / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # The width of A4 within margins of a centimetre; nothing can be scrolled on paper.
    page.set_viewport_size({"width": 718, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.locator("#budget").is_hidden() and page.locator(".dial").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    page.close()
