"""A new task: one adapter made of those that exist, from about ten rows.

Start reading at `compose.py`; `methods.py` lists the ways. May import `serve`, whose router knows
which tasks are near, and below.
"""
