"""Serves exports of bov-lightning with vLLM: a plugin, which vLLM finds by its entry point."""

import logging

ARCHITECTURE = "BoVForCausalLM"


def register() -> None:
    """Makes exports known to this process of vLLM's.

    vLLM calls this in every process, whatever model it serves, and an error here would end it: what
    is missing is logged, and said again by the model, should it be asked for.
    """
    try:
        from transformers import AutoConfig
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from bov_lightning.interop.hf_model import BoVConfig
        from bov_vllm.refusals import Refusals

        AutoConfig.register(BoVConfig.model_type, BoVConfig, exist_ok=True)
        # By name, so that other models' processes do not import this one.
        ModelRegistry.register_model(ARCHITECTURE, f"bov_vllm.model:{ARCHITECTURE}")
        MODELS_CONFIG_MAP[ARCHITECTURE] = Refusals
    except Exception:
        logging.getLogger("vllm.bov").warning(
            "bov-vllm cannot serve exports of bov-lightning here; other models are as before",
            exc_info=True,
        )
