"""A LoRA in memory and in files. Imports `utils`."""
