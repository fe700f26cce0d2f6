"""A pack at work: in a program that uses mlx-lm, or behind an API like OpenAI's.

May import `packs` and below, and not `phone`, which is on the same layer.
"""
