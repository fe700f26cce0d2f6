"""A budget in adapters: one update for several. Imports `evaluate` and below."""
