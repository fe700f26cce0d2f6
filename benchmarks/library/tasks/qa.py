"""qa: a card of facts about two countries and a question; the answer is a span of the card."""

import json
import random

from benchmarks.library.splits import SHARES, Row, side
from benchmarks.library.tasks.languages import NAMES
from benchmarks.library.tasks.words import WORDS

LANGUAGES = {"qa": ("en", "de", "es", "fr", "it", "nl", "pl", "pt")}
FACTS = ("capital", "currency", "language", "area", "region")
_CARDS = 3  # of every country and question
_AS_CLDR = {"South-Eastern Asia": "Southeast Asia", "Southeast Europe": "Southern Europe"}


def needs(kind: str, language: str) -> tuple[str, ...]:
    """The sources of a task."""
    return ("world-countries", "cldr-localenames", "cldr-dates", "cldr-numbers")


def rows(kind: str, language: str, sources, seed: int) -> list[Row]:
    """Rows of a task. The two countries of a card are on the same side of the split."""
    labels, questions = (WORDS["qa"][language][part] for part in ("labels", "questions"))
    facts = countries(language, sources)
    draw = random.Random(f"{seed}:qa")
    found = []
    for name in SHARES:
        codes = sorted(code for code in facts if side(f"country {code}", seed) == name)
        for code in codes:
            for fact in FACTS:
                for _ in range(_CARDS):
                    card = draw_card(code, fact, codes, facts, labels, draw)
                    if card:
                        question = questions[fact].format(facts[code]["name"])
                        prompt = f"Answer in {NAMES[language]} from the facts. {card}\n{question}"
                        found.append(Row(prompt, facts[code][fact], f"country {code}"))
    return found


def draw_card(code, fact, codes, facts, labels, draw):
    """Two countries with the fact asked for, which differs, and another; None if there are none."""
    own = facts[code]
    others = [one for one in codes if facts[one].get(fact) not in (None, own.get(fact))]
    if fact not in own or not others:
        return None
    other = facts[draw.choice(others)]
    more = [one for one in FACTS if one != fact and one in own and one in other]
    shown = {fact, draw.choice(more)} if more else {fact}
    both = [own, other]
    draw.shuffle(both)
    return " | ".join(
        f"{one['name']} — "
        + ", ".join(f"{labels[key]}: {one[key]}" for key in FACTS if key in shown)
        for one in both
    )


def countries(language: str, sources) -> dict[str, dict[str, str]]:
    """Country code -> its name and the facts that CLDR has in a language, of the UN's members."""
    names, english = Names(language, sources), Names("en", sources)
    # Japanese spells every city in its own way, so that its table has all time zones.
    zones = Names("ja", sources).cities.keys()
    codes = {text: code for code, text in english.languages.items()}
    regions = {text: code for code, text in english.territories.items() if code.isdigit()}
    data = sources.members("world-countries", r"package/countries\.json")
    found = {}
    for one in json.loads(data["package/countries.json"]):
        if not (one["unMember"] and one["area"] > 1000 and one["capital"]):
            continue
        facts = {
            "name": names.territories.get(one["cca2"]),
            "capital": names.city(one["capital"][0], english, zones),
            "currency": names.currencies.get(only(one["currencies"])),
            "language": names.languages.get(codes.get(only(one["languages"].values()))),
            "area": names.number(round(one["area"])) + " km²",
            "region": names.territories.get(
                regions.get(_AS_CLDR.get(one["subregion"], one["subregion"]))
            ),
        }
        found[one["cca2"]] = {key: text for key, text in facts.items() if text}
    return {code: facts for code, facts in found.items() if "name" in facts}


def only(values):
    """The only one of some values; a question has one answer."""
    return next(iter(values)) if len(values) == 1 else None


class Names:
    """CLDR's names of things in one language."""

    def __init__(self, language: str, sources) -> None:
        def read(source, file):
            data = sources.members(source, rf"package/main/{language}/{file}\.json")
            return json.loads(next(iter(data.values())))["main"][language]

        display = "localeDisplayNames"
        self.territories = read("cldr-localenames", "territories")[display]["territories"]
        self.languages = read("cldr-localenames", "languages")[display]["languages"]
        money = read("cldr-numbers", "currencies")["numbers"]["currencies"]
        self.currencies = {code: one["displayName"] for code, one in money.items()}
        numbers = read("cldr-numbers", "numbers")["numbers"]
        self.grouping = int(numbers["minimumGroupingDigits"])
        self.mark = numbers["symbols-numberSystem-latn"]["group"]
        zones = read("cldr-dates", "timeZoneNames")["dates"]["timeZoneNames"]["zone"]
        self.cities = dict(_cities(zones))

    def city(self, name: str, english: "Names", zones) -> str | None:
        """A capital as CLDR calls the city of its time zone; None where it has none.

        Names that are the zone's are left out of CLDR's tables.
        """
        spelt = (zone for zone, city in english.cities.items() if city == name)
        zone = next(spelt, name.replace(" ", "_"))
        if self.cities == english.cities:
            return name
        return self.cities.get(zone, name) if zone in zones else None

    def number(self, value: int) -> str:
        """An integer with the language's digit groups."""
        if len(str(value)) < 3 + self.grouping:
            return str(value)
        return f"{value:,}".replace(",", self.mark)


def _cities(zones):
    """Yield the last part of a zone's name and the city it stands for."""
    for name, value in zones.items():
        if "exemplarCity" in value:
            yield name, value["exemplarCity"]
        elif isinstance(value, dict) and "_type" not in value:
            yield from _cities(value)
