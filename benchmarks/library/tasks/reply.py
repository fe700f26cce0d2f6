"""reply: confirm a command to a home, as the translators of Home Assistant wrote both."""

import json
import random
from collections import Counter

from benchmarks.library.splits import Row
from benchmarks.library.tasks.home_assistant import Home
from benchmarks.library.tasks.languages import NAMES
from benchmarks.library.tasks.words import WORDS

LANGUAGES = {"reply": ("en", "de", "es", "fr", "it", "nl", "pt")}
_FILES = {"pt": "pt-BR"}
_PER_INTENT, _PER_ANSWER = 170, 100


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return ("home-assistant-intents", "hassil")


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task, of every intent and answer so many at most; a group is a template."""
    name = _FILES.get(language, language)
    pattern = rf"home_assistant_intents/data/{name}\.json"
    data = next(iter(sources.members("home-assistant-intents", pattern).values()))
    start = f"Reply in {NAMES[language]} to this voice command: "
    draw = random.Random(f"{seed}:reply-{language}")
    found: list[Row] = []
    answers: Counter[str] = Counter()
    for intent in Home(json.loads(data), WORDS["reply"][language], draw).intents():
        draw.shuffle(intent)
        for said, answer, template, masked in intent[:_PER_INTENT]:
            answers[answer] += 1
            if answers[answer] <= _PER_ANSWER:
                group = f"template {language} {template}"
                found.append(Row(start + said, answer, group, (masked,)))
    return found
