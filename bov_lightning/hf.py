"""``import bov_lightning.hf`` registers the classes with `transformers`."""

import bov_lightning.interop.hf_export  # noqa: F401
