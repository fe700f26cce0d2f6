"""A budget in bytes: rank and bits of what is stored. Imports `merge` and below."""
