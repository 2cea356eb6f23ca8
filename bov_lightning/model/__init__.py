"""The network: configuration, value sources, attention, transformer. Knows no files and no ranks."""
