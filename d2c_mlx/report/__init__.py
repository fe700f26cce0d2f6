"""Results for people: Markdown, HTML, charts. Computes nothing. Imports `phone` and below."""
