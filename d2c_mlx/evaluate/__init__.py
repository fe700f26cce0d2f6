"""Exact, cached losses of adapters on rows, and the scores of their answers.

May import `models` and below.
"""
