"""A base model and the rows it reads. Imports `adapters` and `utils`."""
