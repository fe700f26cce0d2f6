"""D2C and its baselines: numpy behind two callables. Imports nothing of this package."""
