"""Formats: exported packs in other programs, beside ours."""
