"""The kit's speed and memory, measured: `python -m tools.bench`."""
