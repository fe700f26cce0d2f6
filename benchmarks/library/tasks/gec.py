"""gec: correct the errors of a sentence.

Ukrainian: errors that people made. Others: sentences of a translated program, given misspellings
that people make (LibreOffice's autocorrect tables), words taken for one another, and slips.
"""

import html
import random
import re
import unicodedata

from benchmarks.library.sources import unzip
from benchmarks.library.splits import Row
from benchmarks.library.tasks.languages import NAMES
from benchmarks.library.tasks.messages import catalogue, sentences
from benchmarks.library.tasks.words import WORDS

LANGUAGES = {"gec": ("en", "de", "es", "fr", "it", "nl", "pl", "pt", "uk")}
# English sentences are the messages that others translate.
_LOCALES = {"en": "de", "pt": "pt_BR"}
_TABLES = {"en": "en-US", "nl": "nl-NL", "pl": "pl-PL", "pt": "pt-BR"}
# How often each kind of error is tried.
_KINDS = {"misspelt": 4, "confused": 4, "accent": 2, "slip": 3, "forgotten": 1, "case": 1}
_EDGES = '.,;:!?"„“”»«()¿¡'


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return ("ua-gec",) if language == "uk" else ("pretix", "polib", "libreoffice-common")


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task."""
    pairs = _genuine(sources) if language == "uk" else _made(language, sources, seed)
    start = f"Correct the errors in this {NAMES[language]} sentence: "
    return [Row(start + wrong, right, group, (right,)) for wrong, right, group in pairs]


def _genuine(sources):
    """Yield `(wrong, right, document)` of the Ukrainian corpus, first annotator."""
    part = r"ua_gec/data/gec-only/(train|test)/"
    right = sources.members("ua-gec", part + r"target-sentences/\d+\.a1\.txt")
    wrong = sources.members("ua-gec", part + r"source-sentences/\d+\.src\.txt")
    for name, data in right.items():
        source = name.replace("target-", "source-").replace(".a1.", ".src.")
        ones, others = (text.decode().splitlines() for text in (wrong[source], data))
        for one, other in zip(ones, others) if len(ones) == len(others) else ():
            short = 25 <= len(one) <= 90 and 25 <= len(other) <= 90
            # Typography alone is no error: annotators put dashes right in half of the sentences.
            if (
                short
                and _typed(one) != _typed(other)
                and not re.search(r"https?:|[<>{}_@#*]", one + other)
            ):
                yield one, other, f"ua-gec {source.rsplit('/', 1)[-1]}"


def _typed(text):
    """A text as a plain keyboard types it, without what opens or closes a line of a dialogue."""
    plain = re.sub(r"[«»“”„]", '"', re.sub(r"\s*[-–—]+\s*", "-", text)).replace("…", "...")
    return plain.strip("-;:, ")


def _made(language, sources, seed):
    """Yield `(wrong, right, message)`; one wrong version of every sentence."""
    messages = catalogue(sources, "pretix", _LOCALES.get(language, language))
    if language == "en":
        messages = {key: key[1] for key in messages}
    errors = Errors(language, autocorrect(language, sources))
    for right, group in sorted(sentences(messages).items()):
        if len(right) <= 110:
            wrong = errors.put(right, random.Random(f"{seed}:{right}"))
            if wrong != right:
                yield wrong, right, group


def autocorrect(language: str, sources) -> dict[str, list[str]]:
    """Right word -> misspellings, all in lower case, of LibreOffice."""
    name = _TABLES.get(language, language)
    file = sources.members("libreoffice-common", rf".*/autocorr/acor_{name}\.dat")
    text = unzip(next(iter(file.values())), "DocumentList.xml")["DocumentList.xml"].decode()
    found: dict[str, list[str]] = {}
    entry = r'block-list:abbreviated-name="([^"]*)" block-list:name="([^"]*)"'
    for pair in re.findall(entry, text):
        wrong, right = (html.unescape(word).strip().lower() for word in pair)
        # Words only: the tables also put accents, quotes and fractions right.
        if wrong != right and len(wrong) > 2 and all(re.fullmatch(r"[^\W\d_]+", w) for w in pair):
            found.setdefault(right, []).append(wrong)
    return found


class Errors:
    """Puts one or two errors into sentences of a language."""

    def __init__(self, language: str, misspelt: dict[str, list[str]]) -> None:
        words = WORDS["gec"][language]
        pairs = [pair.split() for pair in words["confused"]]
        self.confused = {a: b for a, b in pairs} | {b: a for a, b in pairs}
        self.forgotten = set(words["forgotten"])
        self.misspelt = misspelt
        self.nouns = language == "de"  # have capitals anywhere

    def put(self, sentence: str, draw: random.Random) -> str:
        """The sentence with errors, or as it is where none fits."""
        words, touched = sentence.split(" "), set()
        for _ in range(draw.choice((1, 1, 2))):
            kinds = list(_KINDS)
            while kinds:
                kind = draw.choices(kinds, [_KINDS[one] for one in kinds])[0]
                kinds.remove(kind)
                places = [i for i in range(len(words)) if i not in touched]
                draw.shuffle(places)
                if self._put(kind, words, places, touched, draw):
                    break
        return " ".join(word for word in words if word)

    def _put(self, kind, words, places, touched, draw):
        """One error of a kind at the first place where it fits; whether it did anywhere."""
        for i in places:
            core = words[i].strip(_EDGES)
            wrong = (
                getattr(self, f"_{kind}")(core, i, draw)
                if core.replace("'", "").isalpha()
                else None
            )
            if wrong is not None and wrong != core:
                words[i] = words[i].replace(core, wrong, 1)
                touched.add(i)
                return True
        return False

    def _misspelt(self, word, i, draw):
        found = self.misspelt.get(word.lower())
        return _like(draw.choice(found), word) if found else None

    def _confused(self, word, i, draw):
        other = self.confused.get(word.lower())
        return _like(other, word) if other else None

    def _accent(self, word, i, draw):
        plain = unicodedata.normalize("NFD", word.replace("ß", "ss").replace("ł", "l"))
        return "".join(c for c in plain if not unicodedata.combining(c))

    def _slip(self, word, i, draw):
        if len(word) < 5:
            return None
        j = draw.randrange(1, len(word) - 2)
        return draw.choice((
            word[:j] + word[j + 1] + word[j] + word[j + 2 :],
            word[:j] + word[j + 1 :],
            word[: j + 1] + word[j:],
        ))  # fmt: skip

    def _forgotten(self, word, i, draw):
        return "" if i and word in self.forgotten else None

    def _case(self, word, i, draw):
        fits = word[0].isupper() and word[1:].islower() and (i == 0 or self.nouns)
        return word.lower() if fits else None


def _like(word, model):
    """A word with a capital where the model has one."""
    return word[0].upper() + word[1:] if model[:1].isupper() else word
