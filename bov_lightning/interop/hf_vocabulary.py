"""Another vocabulary for a network that has its weights: embedding, head and tables alike."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.transformer import Transformer


def vocabulary_dimensions(config: TransformerConfig) -> dict[str, int]:
    """Which parameters have an entry per token id, by name, and along which dimension.

    Found by asking the network itself, so that value sources of somebody's own count too.
    """
    shapes = []
    for vocab_size in (config.padded_vocab_size, 2 * config.padded_vocab_size):
        with torch.device("meta"):
            network = Transformer(replace(config, vocab_size=vocab_size))
        shapes.append({name: p.shape for name, p in network.named_parameters()})
    found = {}
    for name, shape in shapes[0].items():
        sizes = zip(shape, shapes[1][name], strict=True)
        different = [i for i, (one, other) in enumerate(sizes) if one != other]
        if different:
            found[name] = different[0]
    return found


@torch.no_grad()
def resize_vocabulary(model: Transformer, vocab_size: int, as_mean: bool) -> None:
    """Gives a network ``vocab_size`` token ids; those that both have keep their weights.

    Args:
        model: changed where it stands; parameters that grow or shrink are new ones.
        vocab_size: how many.
        as_mean: whether new ids start as the mean of the old ones; else as in a new network.
    """
    old = model.config
    config = replace(old, vocab_size=vocab_size)
    n_common = min(old.vocab_size, vocab_size)
    fresh = {} if as_mean else dict(Transformer(config).named_parameters())
    for name, dimension in vocabulary_dimensions(old).items():
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        weight = getattr(module, leaf)
        kept = weight.narrow(dimension, 0, n_common)
        if as_mean:
            mean = kept.float().mean(dimension, keepdim=True).to(weight)
            shape = [*weight.shape]
            shape[dimension] = config.padded_vocab_size - n_common
            rest = mean.expand(shape)
        else:
            size = config.padded_vocab_size - n_common
            rest = fresh[name].narrow(dimension, n_common, size).to(weight)
        # What a source has beside its entries per id comes after them.
        own = old.padded_vocab_size
        other = weight.narrow(dimension, own, weight.shape[dimension] - own)
        grown = torch.cat((kept, rest, other), dim=dimension)
        setattr(module, leaf, nn.Parameter(grown, requires_grad=weight.requires_grad))
    for module, name, value in _numbers_that_change(model, old, config):
        setattr(module, name, value)


def _numbers_that_change(
    model: Transformer, old: TransformerConfig, new: TransformerConfig
) -> Iterator[tuple[nn.Module, str, int | TransformerConfig]]:
    """(module, attribute, value) of what modules remember of the vocabulary's size."""
    with torch.device("meta"):
        before, after = Transformer(old), Transformer(new)
    for name, module in before.named_modules():
        other = after.get_submodule(name)
        for attribute, value in vars(module).items():
            changed = vars(other).get(attribute)
            if isinstance(value, int | TransformerConfig) and changed != value:
                yield model.get_submodule(name), attribute, changed
