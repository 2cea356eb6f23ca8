"""The network: configuration, value sources, attention, transformer. Knows no files, no ranks."""
