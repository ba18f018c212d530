"""From files on disk to batches of uint8 RGB images, in an order that is a pure function."""
