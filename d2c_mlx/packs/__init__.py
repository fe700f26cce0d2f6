"""What ships, and how it changes: pack, manifest, export, hub. Imports `compress` and below."""
