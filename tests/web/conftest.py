"""Fixtures for tests of the server."""

from helpers.served import answer, mixed, model_path, pack

__all__ = ["answer", "mixed", "model_path", "pack"]
