"""What is not served, said in one line before anything is loaded."""

from typing import TYPE_CHECKING

import vllm
from vllm.platforms import current_platform

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.upstream import VLLM

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

KINDS = ("stored", "keys")
"""What ``bov_values`` of a configuration may be: see `bov_vllm.model.kind_of_pages`."""


def check_version(found: str) -> None:
    """Refuses another minor version, whose inner parts may have another meaning."""
    if not found.startswith(f"{VLLM}."):
        raise UserError(
            f"bov-vllm serves with vLLM {VLLM}, not {found}: pip install 'vllm=={VLLM}.*', or a "
            "bov-vllm that belongs to it"
        )


def check_network(shape: TransformerConfig) -> None:
    """Refuses a network that vLLM's attention cannot compute."""
    if shape.document_start is not None:
        raise UserError(
            f"document_start is {shape.document_start}: vLLM has no mask that ends at a document's "
            "start; bov generate serves this model, or export one that was trained without"
        )


class Refusals:
    """What vLLM asks about a configuration before it starts any process."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Nothing: the whole configuration says more."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raises a `UserError` for what is not served."""
        check_version(vllm.__version__)
        given = vllm_config.model_config.hf_config
        check_network(given.transformer_config())
        if (kind := getattr(given, "bov_values", None)) not in (None, *KINDS):
            raise UserError(f"bov_values is {kind!r}: use {' or '.join(KINDS)}")
        parallel = vllm_config.parallel_config
        for name in (
            "tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ):  # fmt: skip
            if (size := getattr(parallel, name)) > 1:
                raise UserError(
                    f"{name} is {size}: bov-vllm serves on one device, start one server for each"
                )
        if (
            current_platform.is_cuda_alike()
            and not vllm_config.use_v2_model_runner
            and not vllm_config.model_config.enforce_eager
        ):
            raise UserError(
                "on a GPU bov-vllm needs vLLM's second runner, whose graphs know the past ids: "
                "unset VLLM_USE_V2_MODEL_RUNNER, or give --enforce-eager"
            )
        for name, wanted in {
            "kv_transfer_config": vllm_config.kv_transfer_config is not None,
            "quantization": vllm_config.quant_config is not None,
            "enable_prompt_embeds": vllm_config.model_config.enable_prompt_embeds,
        }.items():
            if wanted:
                raise UserError(
                    f"{name}: bov-vllm keeps token ids beside vLLM's pages and has plain matrices, "
                    "so leave it out"
                )
