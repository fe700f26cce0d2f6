"""A pack at work: in a program that uses mlx-lm, or for many requests in one batch, without HTTP.

May import `packs` and below, and not `phone`, which is on the same layer.
"""
