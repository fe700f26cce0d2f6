"""Commands drawn from the templates of Home Assistant's intents, and their answers."""

import random
import re

_TRIES, _PER_TEMPLATE = 40, 5
_OPTIONAL = 0.35  # how often an optional part is said
# Rules for what speech recognition mishears, and answers that depend on the state of the home.
_MISHEARD = re.compile(r"stt|fix|dirty|typo|misspel")
_STATE = re.compile(r"\b(state|states|state_attr|query|now|timers|canceled)\b")


class Skip(Exception):
    """The template needs something that a sentence alone does not have, or did not agree."""


class Home:
    """Draws commands from the templates of a language, and renders the answers."""

    def __init__(self, data: dict, words: dict, draw: random.Random) -> None:
        from hassil.intents import Intents
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.answers = data["responses"]["intents"]
        self.parsed = Intents.from_dict(data)
        self.language, self.words, self.draw = data["language"], words, draw
        # The template or the answer needs more than its slots.
        self.lacking = (LookupError, TypeError, ValueError, TemplateError)
        self.jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        # What nobody says, a word twice, a gap after an apostrophe.
        patterns = [*(f"({one})" for one in words["wrong"]), r"(?P<twice>\w+) (?P=twice)"]
        self.wrong = re.compile(rf"\b({'|'.join(patterns)})\b|' ", re.IGNORECASE)
        before = words["before"]
        every = [one for kind in ("area", "name") for one in before[kind].values()]
        self.joints = {word for some in every for word in some} | set(before["never"])

    def intents(self):
        """Yield the commands of one intent after the other: `(said, answer, template, masked)`."""
        for name, intent in sorted(self.parsed.intents.items()):
            found = []
            for data in intent.data:
                answer = self.answers.get(name, {}).get(data.response or "default", "")
                if answer and not _STATE.search(answer):
                    for sentence in data.sentences:
                        found += self.commands(sentence, data, answer)
            yield found

    def commands(self, sentence, data, answer):
        """A few different commands of a template; none where it cannot be said on its own."""
        found = {}
        for _ in range(_TRIES):
            try:
                said, masked, slots = self.command(sentence, data)
                reply = self.jinja.from_string(answer).render(slots={**(data.slots or {}), **slots})
            except Skip:
                continue
            except self.lacking:
                break
            reply = " ".join(reply.split())
            if any(one in reply for one in self.untranslated(slots)):
                continue
            if reply and len(said.split()) > 1:
                found.setdefault(said, (_capital(reply), sentence.text, masked))
            if len(found) == _PER_TEMPLATE:
                break
        return [(said, *rest) for said, rest in found.items()]

    def untranslated(self, slots):
        """The English names of devices, which an answer in another language must not have."""
        classes = _listed(slots.get("device_class", []))
        return [] if self.language == "en" else [one for one in classes if one]

    def command(self, sentence, data):
        """`(said, masked, slots)` of one draw. Values are marked until they have been agreed."""
        slots = {}
        text = self.say(sentence.expression, data, slots)
        if "\x03" in re.sub(r"\x03([^\x04]*)\x04(\s*)(?=\x01)", r"\1\2", text):
            raise Skip  # an article drawn from several, before a word whose gender is not known
        text = re.sub("[\x03\x04]", "", text)
        for joint, kind, gender in re.findall(r"(\S*)\s?\x01(\w+),(\w+):", text):
            word = joint.casefold()
            word = re.sub(r".*(?=\b\w+')", "", word) if "'" in word else word
            if word in self.joints and word not in self.words["before"][kind][gender]:
                raise Skip
        said = re.sub(r"\x01\w+,\w+:([^\x02]*)\x02", r"\1", text)
        if self.wrong.search(said):
            raise Skip
        masked = re.sub(r"\d+", "0", re.sub(r"\x01[^\x02]*\x02", "slot", text))
        return " ".join(said.split()), " ".join(masked.split()), slots

    def say(self, part, data, slots):
        """The text of a part of a template."""
        from hassil.expression import (
            Alternative,
            ListReference,
            Permutation,
            RuleReference,
            Sequence,
            TextChunk,
        )

        if isinstance(part, TextChunk):
            return part.original_text
        if isinstance(part, ListReference):
            return self.value(part.list_name, part.slot_name, data, slots)
        if isinstance(part, RuleReference):
            if _MISHEARD.search(part.rule_name):
                raise Skip
            own = (data.expansion_rules or {}).get(part.rule_name)
            rule = own or self.parsed.expansion_rules[part.rule_name]
            return self.say(rule.expression, data, slots)
        if isinstance(part, Alternative):
            if part.is_optional and self.draw.random() >= _OPTIONAL:
                return ""
            full = [one for one in part.items if not (isinstance(one, TextChunk) and one.is_empty)]
            text = self.say(self.draw.choice(full or part.items), data, slots)
            return f"\x03{text}\x04" if self.is_joint(full) else text
        if isinstance(part, Permutation):
            return " ".join(self.say(one, data, slots) for one in part.items)
        if isinstance(part, Sequence):
            return self.sequence(part.items, data, slots)
        raise Skip

    def sequence(self, parts, data, slots):
        """Parts one after the other. Endings are not optional: `minute[s]` is in the plural."""
        text = ""
        for part in parts:
            said = self.say(part, data, slots)
            if not said and text[-1:].isalpha() and getattr(part, "is_optional", False):
                first = getattr(part.items[0], "original_text", "")
                article = text.split()[-1].casefold() in self.joints
                said = first if re.fullmatch(r"[^\W\d_]{1,3}", first) and not article else ""
            text += said
        return text

    def is_joint(self, parts):
        """True if these are several articles, one of which fits."""
        texts = {text for one in parts for text in self.literals(one)}
        return len(texts) > 1 and texts <= self.joints

    def literals(self, part):
        """The words that a part may say, if those are single words."""
        if hasattr(part, "rule_name") and part.rule_name in self.parsed.expansion_rules:
            part = self.parsed.expansion_rules[part.rule_name].expression
        if hasattr(part, "original_text"):
            return {part.original_text.strip().casefold()}
        items = getattr(part, "items", [])
        alone = hasattr(part, "is_optional") or len(items) == 1
        return {text for one in items for text in self.literals(one)} if alone else {"?"}

    def value(self, name, slot, data, slots):
        """A value for a slot, marked if it is a room or a device."""
        if name in ("area", "name"):
            kind = "area" if name == "area" else self.domain(data)
            pairs = [(one, some) for one, some in self.words[kind].items()]
            gender, some = self.draw.choices(pairs, [len(words) for _, words in pairs])[0]
            slots[slot] = self.draw.choice(some)
            return f"\x01{name},{gender}:{slots[slot]}\x02"
        if name in ("todo_list_item", "shopping_list_item"):
            slots[slot] = self.draw.choice(self.words["item"])
            return f"\x01item,x:{slots[slot]}\x02"
        values = (data.slot_lists or {}).get(name) or self.parsed.slot_lists.get(name)
        if hasattr(values, "start"):
            slots[slot] = self.number(name, values)
            return str(slots[slot])
        if hasattr(values, "values"):
            one = self.draw.choice(values.values)
            chunk = one.text_in
            text = chunk if isinstance(chunk, str) else self.say(chunk, data, slots)
            slots[slot] = one.value_out
            return text
        raise LookupError(f"{name}: anything may stand there")

    def number(self, name, values):
        """A number that somebody would say."""
        if name == "temperature":
            return self.draw.randrange(15, 29)
        if name.startswith("timer"):
            return self.draw.randrange(2, 51)
        low, high = max(values.start, 10), values.stop
        return self.draw.randrange(low, high + 1, 5 if high <= 100 else 100)

    def domain(self, data):
        """The kind of device that a template is about; others cannot be named."""
        for where in (data.requires_context, data.slots):
            domain = (where or {}).get("domain")
            domain = domain.get("value") if isinstance(domain, dict) else domain
            known = [one for one in _listed(domain) if one in self.words]
            if known:
                return self.draw.choice(known)
        raise LookupError("no domain")


def _listed(value):
    return value if isinstance(value, list) else [value]


def _capital(text):
    return text[0].upper() + text[1:]
