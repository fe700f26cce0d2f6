"""Fixtures for tests of a pack at work."""

from helpers.served import answer, model_path, pack, packs, server

__all__ = ["answer", "model_path", "pack", "packs", "server"]
