"""Processes, devices, and what ranks agree on."""
