"""The first steps: what this machine and a folder of adapters have, and what a run still needs.

May import `run` and below; no run imports it.
"""
