"""Fixtures for tests of a pack at work."""

from helpers.loading import library
from helpers.served import answer, mixed, model_path, pack

__all__ = ["answer", "library", "mixed", "model_path", "pack"]
