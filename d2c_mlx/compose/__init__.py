"""One adapter for a new task, from adapters of other tasks and about ten rows.

Start reading at `compose.py`; `methods.py` lists the ways, `trained.py` has those of papers that
train something else than a LoRA. May import `serve`, whose router knows which tasks are near.
"""
