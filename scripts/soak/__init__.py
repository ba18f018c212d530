"""Training under injected faults: `python -m scripts.soak`."""
