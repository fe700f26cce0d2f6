"""One run and its directory: options, inputs, artifacts, and which stages are done.

May import `report` and below.
"""
