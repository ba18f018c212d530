"""Training with one change at a time: `python -m scripts.study`."""
