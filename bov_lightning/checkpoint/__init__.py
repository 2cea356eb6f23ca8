"""Checkpoint directories: their format, reading, writing, resuming."""
