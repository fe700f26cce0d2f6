"""Which adapters to merge: D2C and its baselines, in numpy over two callables.

May import no other wing.
"""
