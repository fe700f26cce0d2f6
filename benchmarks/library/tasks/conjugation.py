"""Sentences of `words.yaml` with conjugated verbs, addressed familiarly and politely."""

import json
import random
from collections.abc import Iterator

from benchmarks.library.tasks.words import WORDS

FILES = {"fr": "french", "it": "italian", "pt": "portuguese"}
_VERBS, _FRAMES = 400, 5  # the most common verbs; frames of each


def conjugated(language: str, sources, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield `(informal, formal, group)`: some frames of every common verb; a group is a verb."""
    words = WORDS["tone"][language]
    draw = random.Random(f"{seed}:tone-{language}")
    tables = Conjugation(language, sources)
    verbs = [verb for verb in common(language, sources) if verb in tables.verbs]
    for verb in [verb for verb in verbs if verb not in words["without"]][:_VERBS]:
        for mood, tense, i, j, informal, formal in draw.sample(words["frames"], _FRAMES):
            one, other = (tables.form(verb, mood, tense, number) for number in (i, j))
            if one and other:
                yield (*(_capital(frame.format(form))
                         for frame, form in ((informal, one), (formal, other))),
                       f"verb {language} {verb}")  # fmt: skip


def common(language: str, sources) -> list[str]:
    """Common words, the most common first."""
    pattern = rf"package/build/resources/{FILES[language]}\.txt"
    return next(iter(sources.members("common-words", pattern).values())).decode().split()


class Conjugation:
    """The conjugation tables of a language."""

    def __init__(self, language: str, sources) -> None:
        pattern = rf"mlconjug3/data/conjug_manager/(verbs|conjugation)-{language}\.json"
        tables, verbs = sources.members("mlconjug3", pattern).values()
        self.verbs = json.loads(verbs)
        self.tables = {
            name: {
                (_readable(mood), _readable(tense)): dict(forms)
                for mood, tenses in table.items()
                for tense, forms in tenses.items()
                if isinstance(forms, list) and all(isinstance(form, list) for form in forms)
            }
            for name, table in json.loads(tables).items()
        }

    def form(self, verb: str, mood: str, tense: str, number: int) -> str:
        """A form; nothing where the verb has none or several."""
        entry = self.verbs[verb]
        table = self.tables.get(entry["template"], {})
        ending = table.get((_readable(mood), _readable(tense)), {}).get(number)
        form = entry["root"] + ending if ending else ""
        return form if form.isalpha() else ""


def _readable(name):
    """A table's name without case; some have UTF-8 that was read as Latin-1."""
    try:
        return name.encode("latin-1").decode().casefold()
    except UnicodeError:
        return name.casefold()


def _capital(sentence):
    return sentence[0].upper() + sentence[1:]
