"""A pack at work: in a program, or behind OpenAI's API. Imports `packs` and below."""
