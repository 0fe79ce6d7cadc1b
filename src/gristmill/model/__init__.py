"""The decoder: configuration, packed attention, transformer, reward head, weights on disk, and sizes."""
