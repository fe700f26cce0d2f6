"""Clustering: D2C and its baselines, numpy behind two callables. Imports none of this package."""
