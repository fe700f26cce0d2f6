"""Fixtures for tests of a pack at work."""

from helpers.loading import library
from helpers.served import answer, model_path, pack, packs, server

__all__ = ["answer", "library", "model_path", "pack", "packs", "server"]
