"""Serving: routing of prompts, and a server under load."""
