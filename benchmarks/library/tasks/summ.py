"""summ: a Debian package's description, to be summed up in the one line that its people wrote."""

import re
from collections import Counter

from benchmarks.library.splits import Row
from benchmarks.library.tasks.languages import NAMES

LANGUAGES = {"summ": ("en", "de", "es", "fr", "it", "pl", "pt")}
_FILES = {"pt": "pt_BR"}
_PER_FAMILY = 8  # or else the dictionaries of FreeDict would be a third of a task
# What many families' packages start with.
_COMMON = re.compile(
    r"^(lib|python3?-|node-|golang-|ruby-|php-|haskell-|r-cran-|r-bioc-|r-other-|fonts-|elpa-|"
    r"librust-|libghc-|task-|gir1\.2-|xserver-xorg-|kde-|gnome-|github-\w+-|plasma-)+"
)
# Not summed up by their first paragraph: it is boilerplate, or not translated.
_BAD = re.compile(
    r"<trans>|transition|dummy|meta-?pa|debug|debcargo|https?:|"
    r"^this package (contains|provides) the (header|development|documentation)|\bthe\b.*\bthe\b",
    re.IGNORECASE,
)
_BAD_ENGLISH = re.compile(_BAD.pattern.rsplit("|", 1)[0], re.IGNORECASE)
# Which of a family's packages it is: the first paragraph does not say.
_PART = re.compile(
    r"[(\[;–—]| --? |\b(API|ABI)\b|docu?ment|dokument|development|entwickl|sviluppo|desarroll|"
    r"desenvolv|développement|introspec|runtime|laufzeit|uruchomieniow",
    re.IGNORECASE,
)


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return (f"debian-{_FILES.get(language, language)}",)


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task: the first paragraph of every description, once."""
    return [
        Row(prompt(language, "short", text), line, group(package), (text, line))
        for package, line, text in described(language, sources)
    ]


def prompt(language: str, form: str, text: str) -> str:
    """The prompt that asks for one line of a description."""
    return f"Summarize this {NAMES[language]} package description in one {form} line: {text}"


def described(language: str, sources):
    """Yield `(package, one line, first paragraph)` of what can be summed up."""
    bad = _BAD_ENGLISH if language == "en" else _BAD
    found: set[str] = set()
    families: Counter[str] = Counter()
    for package, line, text in packages(sources.text(needs("summ", language)[0])):
        if not (40 <= len(text) <= 260 and fits(line) and len(line) < 0.8 * len(text)):
            continue
        if bad.search(text) or bad.search(line) or not re.search(r"[.!]$", text):
            continue
        if line.lower() in text.lower() or _PART.search(line):
            continue
        if families[family(package)] == _PER_FAMILY or text in found:
            continue
        families[family(package)] += 1
        found.add(text)
        yield package, line, text


def fits(line: str) -> bool:
    """True if a line has the length of a summary and at least two words."""
    return 12 <= len(line) <= 70 and bool(re.search(r"[^\W\d_]{3}.* .*[^\W\d_]{3}", line))


def packages(index: str):
    """Yield `(package, one line, first paragraph)` of a translation index, in order of names."""
    found = []
    for stanza in index.split("\n\n"):
        name = re.search(r"^Package: (\S+)$", stanza, re.M)
        body = re.search(r"^Description-(?!md5)[\w@]+: ?(.*)\n((?: .*\n?)+)", stanza, re.M)
        if name and body:
            paragraph = first_paragraph(body[2])
            if paragraph:
                found.append((name[1], body[1].strip(), paragraph))
    yield from sorted(found)


def first_paragraph(body: str) -> str:
    """The first paragraph of a long description, or nothing where it is a list."""
    lines = []
    for line in body.splitlines():
        if line.strip() == ".":
            break
        if line.startswith("  ") or re.match(r"\s*[*\-•+] ", line):
            return ""
        lines.append(line.strip())
    return " ".join(lines)


def group(package: str) -> str:
    """The group of a package's rows."""
    return f"package {family(package)}"


def family(package: str) -> str:
    """The family of a package: libfoo1, libfoo-dev, python3-foo-doc and foo are one."""
    stem = _COMMON.sub("", package) or package
    return re.split(r"[-.+\d]", stem)[0] or stem
