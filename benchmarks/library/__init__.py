"""The open task library: its rows and the training of its adapters."""
