"""Helpers that know nothing of LoRA: errors, files, the hub, devices, parsing.

May import no other wing.
"""
