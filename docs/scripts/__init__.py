"""Scripts that make what is read: figures, the command reference, the documentation site."""
