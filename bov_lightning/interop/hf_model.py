"""The network as a `transformers` model, with its cache and `generate`.

An export carries this file and the model's as one, see `bov_lightning.interop.hf_export`.
"""

import dataclasses

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bov_lightning.model.cache import Cache
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.prefill import prefill
from bov_lightning.model.transformer import Transformer

SMALL = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 2, "d_model": 64, "vocab_size": 256,
    "sequence_len": 64, "window_pattern": "L",
}  # fmt: skip


class BoVConfig(PreTrainedConfig):
    """`TransformerConfig`, flat, with the names that `transformers` looks for as aliases."""

    model_type = "bov"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "max_context",
    }

    def __init__(self, max_context=None, **kwargs):
        """The fields of `TransformerConfig`; ``max_context`` is what a cache has room for.

        What is not given is small: `transformers` makes configurations without arguments.
        """
        for field in dataclasses.fields(TransformerConfig):
            missing = SMALL.get(field.name, None if field.name == "value" else field.default)
            setattr(self, field.name, kwargs.pop(field.name, missing))
        self.value = dict(self.value or {})
        self.max_context = max_context or self.transformer_config().max_context
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    def transformer_config(self) -> TransformerConfig:
        """The network's own configuration."""
        names = [field.name for field in dataclasses.fields(TransformerConfig)]
        shape = {name: getattr(self, name) for name in names if name != "value"}
        return TransformerConfig(**shape, value=ValueConfig(**self.value))


class BoVCache(transformers.Cache):
    """`Cache` in the place of a `transformers` cache; room is set aside at the first call."""

    def __init__(self, max_context: int):
        super().__init__(layers=[])
        self.max_context = max_context
        self.past: Cache | None = None
        self.n_column = 0
        """Columns of input_ids seen, padding included."""

    def open(self, model: Transformer, input_ids: Tensor) -> Cache:
        """The network's cache, for new tokens (B, T)."""
        if self.past is None:
            self.past = model.new_cache(len(input_ids), self.max_context)
        self.n_column += input_ids.shape[1]
        return self.past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids that were seen."""
        return self.n_column

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.max_context

    get_max_cache_shape = get_max_length

    @property
    def is_compileable(self) -> bool:
        """No: it grows by Python's counting."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was seen."""
        return self.past is not None

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return 0 if self.past is None else self.past.nbytes

    def __len__(self):
        return 0 if self.past is None else len(self.past.layers)

    def reset(self) -> None:
        """Forgets everything."""
        self.past, self.n_column = None, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps those rows, in that order."""
        self.past = self.past.select(indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.past = self.past.select(
            [row for row in range(self.past.batch_size) for _ in range(repeats)]
        )

    def crop(self, max_length: int) -> None:
        """Refused: a window's ring has already forgotten what cropping would bring back."""
        raise NotImplementedError("a BoV cache cannot be cropped: assisted generation needs that")


class BoVForCausalLM(PreTrainedModel, GenerationMixin):
    """`Transformer` for `transformers`: padding on either side, labels, caches, generation."""

    config_class = BoVConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: BoVConfig):
        super().__init__(config)
        self.model = Transformer(config.transformer_config())
        self.post_init()

    def _init_weights(self, module) -> None:
        # The network fills its own parameters.
        pass

    def get_input_embeddings(self):
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value) -> None:
        """Replaces the token embedding."""
        self.model.embedding = value

    def get_output_embeddings(self):
        """None: the head is no linear layer."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = BoVCache(max(max_cache_length, 1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BoVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocab_size), or of the last ``logits_to_keep`` tokens, in fp32.

        ``attention_mask`` (B, at least T), whose last T columns belong to ``input_ids``: 0 is
        padding, on whichever side. ``labels`` are shifted here; -100 is not counted.
        """
        n_token = input_ids.shape[1]
        order = lengths = None
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("attention_mask must be (batch, time): the network is causal")
            real = attention_mask[:, -n_token:].bool()
            if not real.all():
                order, lengths = (~real).long().argsort(dim=1, stable=True), real.sum(1)
                input_ids = input_ids.gather(1, order)
        # Padding is moved to the right for the network, and its logits back to where it was.
        n_kept = min(logits_to_keep or n_token, n_token)
        kept = torch.arange(n_token, device=input_ids.device)[-n_kept:].expand(len(input_ids), -1)
        positions = kept if order is None else order.argsort(1).gather(1, kept)
        if past_key_values is None and use_cache:
            past_key_values = BoVCache(self.config.max_context)
        if past_key_values is None:
            logits = self.model(input_ids, positions_BP=positions)
        else:
            past = past_key_values.open(self.model, input_ids)
            ends = (
                positions == n_token - 1 if lengths is None else positions == lengths[:, None] - 1
            )
            if n_kept == 1 and bool(ends.all()):
                logits = prefill(self.model, past, input_ids, lengths)[:, None]
            else:
                logits = self.model(input_ids, cache=past, lengths=lengths, positions_BP=positions)
        loss = None
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
