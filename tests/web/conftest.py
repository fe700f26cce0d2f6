"""Fixtures for tests of the server."""

from helpers.served import answer, model_path, pack, packs, server

__all__ = ["answer", "model_path", "pack", "packs", "server"]
