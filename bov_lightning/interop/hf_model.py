"""The network as `transformers` models, with `generate`.

An export carries this file and the model's as one, see `bov_lightning.interop.hf_export`.

Shapes: B batch, T time, C = d_model.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bov_lightning.errors import UserError
from bov_lightning.interop.hf_arguments import Call, read_call
from bov_lightning.interop.hf_cache import BoVCache
from bov_lightning.interop.hf_vocabulary import resize_vocabulary
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.layers import rms_norm
from bov_lightning.model.loss import SOFTCAP
from bov_lightning.model.transformer import Transformer

MODULE = "modeling_bov"
"""The name of an export's modelling file, without its ending."""

AUTO_MAP = {
    "AutoConfig": f"{MODULE}.BoVConfig",
    "AutoModel": f"{MODULE}.BoVModel",
    "AutoModelForCausalLM": f"{MODULE}.BoVForCausalLM",
}
"""Where `transformers` finds what in it."""

SMALL = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 2, "d_model": 64, "vocab_size": 256,
    "sequence_len": 64, "window_pattern": "L",
}  # fmt: skip


class BoVConfig(PreTrainedConfig):
    """`TransformerConfig`, flat, with the names that `transformers` looks for as aliases."""

    model_type = "bov"
    use_cache = True
    final_logit_softcapping = SOFTCAP
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "max_context",
    }

    def __init__(self, max_context=None, **kwargs):
        """The fields of `TransformerConfig`; ``max_context`` is what generation makes room for.

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


class VocabularyRows(nn.Module):
    """The head's weight without its padding, where a linear layer would have it.

    A module without parameters of its own, for those who compute the loss themselves: their logits
    need ``final_logit_softcapping`` of the configuration.
    """

    bias = None

    def __init__(self, network: Transformer):
        super().__init__()
        # A tuple hides a borrowed module from PyTorch.
        self._network = (network,)

    @property
    def weight(self) -> Tensor:
        """(vocab_size, C)."""
        (network,) = self._network
        return network.head.weight[: network.config.vocab_size]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Soft-capped logits of normed hidden states."""
        return self._network[0].head(x_BTC, None, "mean")


class BoVPreTrainedModel(PreTrainedModel):
    """What both models have: the network, its embedding, and how they are called and saved."""

    config_class = BoVConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    # Generation that takes tokens back is refused: a window's ring has forgotten.
    _is_stateful = True

    write_code: ClassVar[Callable[[Path, BoVConfig], None] | None] = None
    """Writes the modelling file into a directory, for a class that is no such file's itself."""

    def __init__(self, config: BoVConfig):
        super().__init__(config)
        self.model = Transformer(config.transformer_config())
        self.vocabulary = VocabularyRows(self.model)
        self.post_init()

    def _init_weights(self, module) -> None:
        # The network fills its own parameters.
        pass

    def get_input_embeddings(self):
        """The token embedding."""
        return self.model.embedding

    def get_submodule(self, target: str) -> nn.Module:
        """The module of that name; PEFT asks for the token embedding by the name that it has in
        BERT, or else looks for one of as many rows as there are ids, and ours has some more."""
        if target == "embeddings.word_embeddings":
            return self.model.embedding
        return super().get_submodule(target)

    def set_input_embeddings(self, value) -> None:
        """Replaces the token embedding by one of the same shape."""
        shape, needed = tuple(value.weight.shape), tuple(self.model.embedding.weight.shape)
        if shape != needed:
            raise UserError(
                f"an embedding of {shape} does not fit, {needed} is needed: "
                "resize_token_embeddings resizes the head and the value tables too"
            )
        self.model.embedding = value

    def get_output_embeddings(self):
        """What has the head's weight; the head itself is no linear layer."""
        return self.vocabulary

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ):
        """Gives embedding, head and value tables room for ``new_num_tokens`` ids.

        New ids start as the mean of the others, or, without ``mean_resizing``, as in a new network.
        All three are padded to a multiple of 64 in any case, which the vocabulary is not.

        Returns:
            The token embedding.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != self.config.vocab_size:
            resize_vocabulary(self.model, size, mean_resizing)
            self.config.vocab_size = size
        return self.get_input_embeddings()

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As everywhere in `transformers`; the modelling file is written along."""
        write = type(self).write_code
        writes = write is not None and not self.is_remote_code()
        if writes:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if writes and is_main_process:
            write(Path(save_directory), self.config)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        for i, block in enumerate(self.model.blocks):
            chosen = enable and i % every_n_layers == 0
            block.recompute = gradient_checkpointing_func if chosen else None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return any(block.recompute is not None for block in self.model.blocks)

    def _run(
        self, use_cache: bool | None, output_attentions: bool | None,
        output_hidden_states: bool | None, others: dict[str, Any], **given,
    ) -> tuple[Call, Tensor, tuple[Tensor, ...] | None]:  # fmt: skip
        """What was asked for; the stream after the last block, (B, T, C), as the network orders it;
        hidden states as the caller orders them, the last one normed, where they are wanted."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            raise UserError("output_attentions: attention weights are never written down here")
        call = read_call(
            self.model.config,
            use_cache=use_cache,
            use_cache_if_possible=self.config.use_cache and not self.training,
            others=others,
            **given,
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [] if output_hidden_states else None
        if call.past is None:
            x_BTC = self.model.stream(
                call.token_ids, embedded_BTC=call.embedded, starts_BT=call.starts, states=states
            )
        else:
            x_BTC = call.past.feed(self.model, call.token_ids, call.lengths, call.embedded, states)
        if states is None:
            return call, x_BTC, None
        states[-1] = rms_norm(states[-1])
        return call, x_BTC, tuple(call.as_given(state) for state in states)

    def _returned(self, output, return_dict: bool | None):
        """The output, as a tuple where that is wanted."""
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class BoVModel(BoVPreTrainedModel):
    """The network up to its hidden states.

    It carries the head of the language model along, untrained, so that what it saves is whole.
    """

    def __init__(self, config: BoVConfig):
        super().__init__(config)
        self.model.head.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As everywhere in `transformers`."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading makes every parameter a new one, which wants to be trained.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.model.head.requires_grad_(False)
        return loaded

    @property
    def base_model(self) -> "BoVModel":
        """Itself."""
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BoVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states (B, T, C), normed as the head reads them. See `BoVForCausalLM.forward`."""
        call, x_BTC, states = self._run(
            use_cache, output_attentions, output_hidden_states, kwargs,
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        output = BaseModelOutputWithPast(
            last_hidden_state=call.as_given(rms_norm(x_BTC)),
            past_key_values=call.past,
            hidden_states=states,
        )
        return self._returned(output, return_dict)


class BoVForCausalLM(BoVPreTrainedModel, GenerationMixin):
    """`Transformer` for `transformers`: padding on either side, labels, caches, generation."""

    accepts_loss_kwargs = True

    @property
    def base_model(self) -> BoVModel:
        """The same network up to its hidden states."""
        seen = BoVModel.__new__(BoVModel)
        nn.Module.__init__(seen)
        seen.config, seen.model, seen.training = self.config, self.model, self.training
        return seen

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation {kind!r}: this network has a cache of its own, leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            # Longer texts get more room when they come.
            room = min(max_cache_length, self.config.max_context)
            model_kwargs["past_key_values"] = BoVCache(max(room, 1))

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # The network counts by itself, and checking would make a GPU wait for every token.
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BoVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, vocab_size) in fp32.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or (B, tokens seen + T) with a cache: 0 is padding, on whichever
                side of the T columns, never between two tokens.
            position_ids: (B or 1, T), counting up by one; 0 starts another text, which sees nothing
                of the one before it (without a cache). Only distances count in this network.
            past_key_values: what an earlier call returned, or a `BoVCache`. What continues one
                carries no gradient.
            inputs_embeds: (B, T, C) in the place of the embedding of ``input_ids``; without these
                only where nothing reads token ids.
            labels: (B, T), shifted here; -100 is not counted. ``shift_labels`` are those that were
                shifted before.
            use_cache: whether past_key_values are returned; as the configuration says (yes) if not
                given, but not in training, of packed texts, or while a graph is made.
            output_attentions: refused.
            output_hidden_states: whether to return the n_layer + 1 streams, the last one normed.
            return_dict: False: a tuple.
            logits_to_keep: the last so many tokens' logits alone, 0 for all; or which ones, (P,).
            num_items_in_batch: what the loss is divided by, in the place of the labels here: those
                of all micro-batches.

        Raises:
            UserError: an argument that cannot be honoured.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        call, x_BTC, states = self._run(
            use_cache, output_attentions, output_hidden_states, kwargs,
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        n_row, n_token = call.token_ids.shape
        column = torch.arange(n_token, device=x_BTC.device)
        keeps_some = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if keeps_some:
            kept = logits_to_keep
            column = column[kept if isinstance(kept, Tensor) else slice(-kept, None)]
        if keeps_some or call.order is not None:
            positions = column.expand(n_row, -1)
            if call.order is not None:
                positions = call.order.argsort(1).gather(1, positions)
            x_BTC = x_BTC.gather(1, positions[:, :, None].expand(-1, -1, x_BTC.shape[2]))
        logits = self.model.head(rms_norm(x_BTC), None, "mean")
        # The head alone must not seem to be trained.
        logits = logits.detach() if call.continues else logits
        loss = None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if shift_labels is not None:
            targets = shift_labels[:, column] if keeps_some else shift_labels
            loss = self._loss(logits, targets.to(logits.device), num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=call.past, hidden_states=states
        )
        return self._returned(output, return_dict)

    @staticmethod
    def _loss(logits: Tensor, targets: Tensor, n_item: Tensor | int | None) -> Tensor:
        """Nats per label, or their sum divided by ``n_item``."""
        flat = logits.flatten(0, 1), targets.flatten()
        if n_item is None:
            return F.cross_entropy(*flat)
        n_item = n_item.to(logits.device) if isinstance(n_item, Tensor) else n_item
        return F.cross_entropy(*flat, reduction="sum") / n_item
