"""A pack at work: in a program that uses mlx-lm, or for many requests in a batch, without HTTP."""
