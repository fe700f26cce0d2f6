"""A pack behind OpenAI's API and a chat page: HTTP, its addresses, and who may ask.

Start reading at `routes.py`. May import `serve`, which answers, and below.
"""
