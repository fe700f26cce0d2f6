"""tone: the same sentence in the other register.

German, Dutch, Spanish: formal to informal, as translators wrote both. French, Italian, Portuguese:
informal to formal, conjugated verbs in sentences of `words.yaml`.
"""

import re
from collections import Counter

from benchmarks.library.sources import unzip
from benchmarks.library.splits import Row, normal
from benchmarks.library.tasks.conjugation import FILES, conjugated
from benchmarks.library.tasks.languages import NAMES
from benchmarks.library.tasks.messages import (
    catalogue,
    is_clean,
    is_plain,
    pairs,
    sentences,
    split_sentences,
)
from benchmarks.library.tasks.words import WORDS

LANGUAGES = {"tone": ("de", "es", "fr", "it", "nl", "pt")}
_PLACES = ("es-es", "es-mx")
_NEEDS = {
    "de": ("pretix", "pretalx", "polib"),
    "nl": ("pretix", "polib"),
    "es": (
        *(f"{product}-{place}" for product in ("firefox", "thunderbird") for place in _PLACES),
        "pretix",
        "polib",
    ),  # fmt: skip
}
# Package, formal and informal locale.
_LOCALES = {
    "de": (("pretix", "de", "de_Informal"), ("pretalx", "de_Formal", "de_DE")),
    "nl": (("pretix", "nl", "nl_Informal"),),
}


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return _NEEDS.get(language, ("mlconjug3", "common-words"))


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task."""
    if language in FILES:
        found, to = conjugated(language, sources, seed), "formal"
    else:
        register, to = Register(WORDS["registers"][language]), "informal"
        both = _mozilla(sources) if language == "es" else _gettext(language, sources)
        found = [one for one in both if register.changes(*one[:2])]
    start = f"Make this {NAMES[language]} sentence {to}: "
    return [Row(start + one, other, group, (one, other)) for one, other, group in found]


class Register:
    """Tells a change of register from another translation.

    Args:
        words: `formal` and `informal`, patterns of whole words that only one side has; `marks`,
            patterns of `old new`, one of which a changed word must match; `others`, how many words
            may differ for other reasons.
    """

    def __init__(self, words: dict) -> None:
        self.formal, self.informal = (
            re.compile(rf"\b({words[side]})\b") if words.get(side) else None
            for side in ("formal", "informal")
        )
        self.marks = words["marks"]
        self.others = words["others"]

    def changes(self, formal: str, informal: str) -> bool:
        """True if the two differ in the register and in hardly anything else."""
        if not (12 <= len(formal) <= 120 and len(informal) <= 120):
            return False
        if self.formal and (not self.formal.search(formal) or self.formal.search(informal)):
            return False
        if self.informal and (self.informal.search(formal) or not self.informal.search(informal)):
            return False
        changed, others = differences(formal, informal)
        marked = any(
            re.fullmatch(mark, f"{old} {new}") for old, new in changed for mark in self.marks
        )
        return marked and others <= self.others


def differences(first: str, second: str) -> tuple[list[tuple[str, str]], int]:
    """`(changed, others)`: words that became another one, and how many more there are.

    Two words belong together if they start alike or if both are short.
    """
    ones, others = (Counter(re.findall(r"[\w'-]+", text.lower())) for text in (first, second))
    gone, new = list((ones - others).elements()), list((others - ones).elements())
    changed = []
    for alike in (lambda a, b: a[:3] == b[:3], lambda a, b: max(len(a), len(b)) < 7):
        for word in list(gone):
            found = next((other for other in new if alike(word, other)), None)
            if found:
                changed.append((word, found))
                gone.remove(word)
                new.remove(found)
    return changed, len(gone) + len(new)


def _gettext(language, sources):
    """Yield `(formal, informal, message)` of catalogues in both registers."""
    for name, formal, informal in _LOCALES[language]:
        first = catalogue(sources, name, formal)
        groups = sentences(first)
        for one, other in pairs(first, catalogue(sources, name, informal)):
            if one in groups and is_clean(other):
                yield one, other, groups[one]


def _mozilla(sources):
    """Yield `(formal, informal, message)` in the Spanish of Spain and of Mexico."""
    # What pretix says as well is in gec-es, and may be on another side there.
    known = {normal(one) for one in sentences(catalogue(sources, "pretix", "es"))}
    for product in ("firefox", "thunderbird"):
        spain, mexico = (
            fluent(sources, f"{product}-{place}", place[:3] + place[3:].upper())
            for place in _PLACES
        )
        for file, key in sorted(spain.keys() & mexico.keys()):
            both = [split_sentences(texts[file, key]) for texts in (spain, mexico)]
            for one, other in zip(*both) if len(both[0]) == len(both[1]) else ():
                seen = {normal(one), normal(other)} & known
                if is_plain(one + other) and len(one.split()) > 2 and not seen:
                    yield one, other, f"mozilla {key.split('.')[0]}"


def fluent(sources, name: str, locale: str) -> dict[tuple[str, str], str]:
    """`(file, key) -> text` of the messages on one line of a language pack."""
    package = next(iter(sources.members(name, r".*\.xpi").values()))
    found = {}
    for path, data in unzip(package, rf".*{locale}.*\.ftl").items():
        key = ""
        for line in data.decode().splitlines():
            if match := re.match(r"([\w-]+) = *(.*)$", line):
                key = match[1]
                found[path.replace(locale, ""), key] = match[2]
            elif match := re.match(r" +\.(\w+) = *(.+)$", line):
                found[path.replace(locale, ""), f"{key}.{match[1]}"] = match[2]
    return found
