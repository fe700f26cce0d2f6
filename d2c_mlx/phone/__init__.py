"""A benchmark of a pack on a quantized base model, as a stand-in for a phone.

May import `packs` and below, and not `serve`, which is on the same layer.
"""
