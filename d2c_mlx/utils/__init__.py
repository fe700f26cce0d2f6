"""What knows no LoRA: errors, files, hub, devices. Imports nothing of this package."""
