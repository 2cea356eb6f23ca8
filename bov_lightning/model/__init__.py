"""The network: configuration, value sources, attention, transformer, cache.

Knows no checkpoint, no Lightning, no ranks.
"""
