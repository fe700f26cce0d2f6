"""Packs, which are what ships: reading, writing, verifying, changing, exporting and pushing them.

May import `compress` and below.
"""
