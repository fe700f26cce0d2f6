"""translate: a Debian package's line in English. brief: the English line of a foreign description.

A brief needs summ and translate at once.
"""

from collections import Counter

from benchmarks.library.splits import Row
from benchmarks.library.tasks import summ
from benchmarks.library.tasks.languages import NAMES

LANGUAGES = {"translate": ("de", "es", "fr"), "brief": ("de", "es", "fr")}
_PER_FAMILY = 4  # or else the packages of one program would be a tenth of a task


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return (*summ.needs("summ", language), "debian-en")


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task."""
    english = {package: line for package, line, _ in summ.packages(sources.text("debian-en"))
               if summ.fits(line)}  # fmt: skip
    if kind == "brief":
        return [
            Row(summ.prompt(language, "short English", text), english[package],
                summ.group(package), (text, english[package]))
            for package, _, text in summ.described(language, sources) if package in english
        ]  # fmt: skip
    return list(lines(language, english, sources))


def lines(language, english, sources):
    """Yield rows of translate: every line once, of some packages of a family."""
    found, families = set(), Counter()
    for package, line, _ in summ.packages(sources.text(summ.needs("summ", language)[0])):
        wanted = english.get(package, line)
        family = summ.family(package)
        if wanted == line or line in found or "<trans>" in line or not summ.fits(line):
            continue
        if families[family] == _PER_FAMILY:
            continue
        families[family] += 1
        found.add(line)
        yield Row(prompt(language, line), wanted, summ.group(package), (line, wanted))


def prompt(language: str, line: str) -> str:
    """The prompt that asks for the English of a line."""
    return f"Translate this {NAMES[language]} line into English: {line}"
