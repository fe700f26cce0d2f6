"""Tools that know no LoRA: errors, files, hub, devices. Imports nothing of this package."""
