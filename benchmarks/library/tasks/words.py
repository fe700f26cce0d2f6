"""The words that no package has: questions, frames, rooms, confusions. See words.yaml."""

from pathlib import Path

import yaml

WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
