"""Refining: a short training of what was merged or planned, towards the task adapters.

Start at `refine.refine`.
"""
