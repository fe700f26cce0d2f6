"""Rows of a task, and their split into train, probe and test by group."""

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Shares of the groups. The held-out splits are filled first: what is on two sides leaves train.
SHARES = {"test": 0.15, "probe": 0.1, "train": 0.75}
LIMITS = {"train": 1200, "probe": 40, "test": 200}


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        prompt: what the user says.
        answer: what the assistant should say.
        group: rows that share it are on the same side; the same name in all tasks and languages.
        keys: texts that must not be on two sides either, such as a corrected sentence.
    """

    prompt: str
    answer: str
    group: str
    keys: tuple[str, ...] = ()

    def message(self) -> dict:
        """The row in mlx-lm's chat format."""
        roles = (("system", ""), ("user", self.prompt), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": text} for role, text in roles]}


def normal(text: str) -> str:
    """Letters and digits only, without case: texts that differ in nothing else are the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def side(group: str, seed: int) -> str:
    """The split of a group: by its hash, so that every task puts it on the same side."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "train"


def split(rows: Iterable[Row], seed: int, limits: dict[str, int] = LIMITS):
    """Split rows by group, no prompt and no key on two sides, no prompt twice.

    Returns:
        `(splits, dropped)`: name -> rows in a seeded order, and reason -> number of rows.
    """
    sides = {name: [] for name in SHARES}
    for row in sorted(rows, key=lambda row: (row.prompt, row.answer, row.group, row.keys)):
        sides[side(row.group, seed)].append(row)
    prompts, keys, dropped = set(), set(), Counter()
    splits = {}
    for name in SHARES:
        random.Random(f"{seed}:{name}").shuffle(sides[name])
        kept, own = [], set()
        for row in sides[name]:
            prompt = normal(row.prompt)
            texts = {normal(key) for key in row.keys}
            if len(kept) == limits[name]:
                dropped["over the limit"] += 1
            elif prompt in prompts:
                dropped["prompt seen before"] += 1
            elif texts & keys:
                dropped["text of another split"] += 1
            else:
                prompts.add(prompt)
                own |= texts
                kept.append(row)
        keys |= own
        splits[name] = kept
    return {name: splits[name] for name in ("train", "probe", "test")}, dict(dropped)
