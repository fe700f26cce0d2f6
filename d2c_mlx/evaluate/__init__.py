"""Losses, exact and cached. Imports `models`, `adapters`, `cluster` and `utils`."""
