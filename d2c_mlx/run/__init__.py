"""A run and its directory: options, artifacts, what is done. Imports every other wing."""
