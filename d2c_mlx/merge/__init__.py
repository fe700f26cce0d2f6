"""Merging several adapters into one: the methods, their tuning, and refining a merge.

May import `evaluate` and below.
"""
