"""Training under faults that are injected on purpose: `scripts/soak`."""
