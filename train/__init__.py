"""The distributed trainer: configuration, the AlexNet family, optimiser, checkpoints, and `train.main`."""
