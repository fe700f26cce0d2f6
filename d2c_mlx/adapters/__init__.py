"""LoRA adapters in memory, and the file formats they are read from and written to.

May import `cluster` and `utils`.
"""
