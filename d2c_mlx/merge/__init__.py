"""Merging several adapters into one, for a budget in adapters. Imports `evaluate` and below."""
