"""Results for people: Markdown, HTML and charts of numbers that other wings computed.

May import `serve`, `phone` and below.
"""
