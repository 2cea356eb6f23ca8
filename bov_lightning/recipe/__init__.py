"""Recipes: typed sections, files and overlays, strict keys, building."""
