"""``import bov_lightning.hf``: `AutoModelForCausalLM.from_pretrained` then reads exports."""

from bov_lightning.interop.hf_import import register

register()
