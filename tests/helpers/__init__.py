"""What tests share: tiny models, adapters, packs, servers, processes. Fixtures: conftest.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
