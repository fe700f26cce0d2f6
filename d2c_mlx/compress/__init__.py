"""Fitting a budget in bytes: quantization, bit allocation, and the planner that chooses.

May import `merge` and below.
"""
