"""Translated user interfaces: sentences of gettext catalogues, grouped by the English message."""

import re
from collections.abc import Iterator

# Nothing with markup, placeholders, addresses or the product's name.
_MARKUP = re.compile(r"[<>{}\[\]%|*\n#_=$\\`~/]|https?:|www\.|@|pretix|pretalx", re.IGNORECASE)
_BOUNDARY = re.compile(r"(?<=[.!?])\s+(?=[A-ZÀ-ÝŁŚŻŹĆ¿¡„\"])")


def catalogue(sources, name: str, locale: str) -> dict[tuple[str, str], str]:
    """`(context, English) -> translation` of the reviewed messages of a package."""
    import polib

    found = {}
    pattern = rf"{name}/locale/{locale}/LC_MESSAGES/django(js)?\.po"
    for data in sources.members(name, pattern).values():
        for entry in polib.pofile(data.decode()):
            if entry.msgstr and not entry.obsolete and not entry.fuzzy:
                found[entry.msgctxt or "", entry.msgid] = entry.msgstr.strip()
    return found


def group_of(message: str) -> str:
    """The group of an English message: its first four words, which variants of it share."""
    return "message " + " ".join(re.findall(r"\w+", message.casefold())[:4])


def sentences(messages: dict[tuple[str, str], str]) -> dict[str, str]:
    """Clean sentence -> group, of the first message that has it."""
    found: dict[str, str] = {}
    for (_, english), text in sorted(messages.items()):
        for sentence in split_sentences(text):
            found.setdefault(sentence, group_of(english))
    return {text: group for text, group in found.items() if is_clean(text)}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [sentence.strip() for sentence in _BOUNDARY.split(text)]


def is_plain(text: str) -> bool:
    """True if a text has no markup and nothing to fill in."""
    return not _MARKUP.search(text)


def is_clean(sentence: str) -> bool:
    """True if it is one plain, whole sentence of at least four words."""
    return (
        is_plain(sentence)
        and sentence[-1:] in tuple(".!?")
        and (sentence[0].isupper() or sentence[0] in "¿¡")
        and len(sentence.split()) >= 4
    )


def pairs(first: dict, second: dict) -> Iterator[tuple[str, str]]:
    """Sentences of the same message in two registers, where they differ."""
    for key in sorted(first.keys() & second.keys()):
        ones, others = split_sentences(first[key]), split_sentences(second[key])
        if len(ones) == len(others):
            yield from ((one, other) for one, other in zip(ones, others) if one != other)
