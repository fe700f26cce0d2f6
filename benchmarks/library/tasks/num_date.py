"""num and date: numbers in words, and dates written out."""

import datetime
import json
import random
import re

from benchmarks.library.splits import Row
from benchmarks.library.tasks.languages import NAMES

LANGUAGES = {
    "num": ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv"),
    "date": ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv"),
}
_CODES = {"pt": "pt_BR"}


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return ("num2words",) if kind == "num" else ("cldr-dates",)


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task."""
    draw = random.Random(f"{seed}:{kind}")
    return _numbers(language, draw) if kind == "num" else _dates(language, sources, draw)


def _numbers(language, draw):
    from num2words import num2words

    # As many below a thousand as an evenly drawn number would hardly ever be.
    numbers = {draw.randrange(1, 1000 if draw.random() < 0.4 else 10000) for _ in range(3000)}
    return [
        Row(f"Write this number in {NAMES[language]} words: {number}",
            num2words(number, lang=_CODES.get(language, language)), f"number {number}")
        for number in sorted(numbers)
    ]  # fmt: skip


def _dates(language, sources, draw):
    file = sources.members("cldr-dates", rf"package/main/{language}/ca-gregorian\.json")
    main = json.loads(next(iter(file.values())))["main"][language]
    calendar = main["dates"]["calendars"]["gregorian"]
    pattern, months = calendar["dateFormats"]["long"], calendar["months"]["format"]["wide"]
    start = datetime.date(1950, 1, 1)
    days = {start + datetime.timedelta(days=draw.randrange(36525)) for _ in range(2500)}
    return [
        Row(f"Write this date in {NAMES[language]}: {day.isoformat()}",
            write_date(day, pattern, months), f"date {day.isoformat()}")
        for day in sorted(days)
    ]  # fmt: skip


def write_date(day: datetime.date, pattern: str, months: dict[str, str]) -> str:
    """A date by a CLDR pattern of d, MMMM, y and quoted text."""
    fields = {"d": str(day.day), "MMMM": months[str(day.month)], "y": str(day.year)}
    return re.sub(
        r"'([^']*)'|MMMM|[dy]", lambda match: match[1] or fields[match[0]], pattern
    )  # fmt: skip
