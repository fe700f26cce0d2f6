"""Rows of the library: a module per kind of task, and what they are made of."""
