"""Merging several adapters into one: the methods, and their tuning.

May import `evaluate` and below.
"""
