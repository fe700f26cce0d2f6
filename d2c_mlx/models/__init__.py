"""Base models: finding, loading and running them, and the rows of tasks that they read.

May import `adapters` and below.
"""
