"""``python -m bov_lightning.cli``, as stored job scripts call it."""

from bov_lightning.cli import entry_point

entry_point()
