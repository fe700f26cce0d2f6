"""One adapter for a new task, from adapters of other tasks and about ten rows.

Start reading at `compose.py`; `methods.py` lists the ways. May import `serve`, whose router knows
which tasks are near.
"""
