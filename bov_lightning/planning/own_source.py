"""A trial of a value source of somebody's own, before anything is trained with it.

What the tests of variants prove for the sources of the package is tried here with one that they do
not know, on a narrow network of the same layers, with noise in all parameters: a parameter that
starts at zero hides whatever it is multiplied with. A mistake is then an error before the budget is
spent, not wrong text after it.

Shapes: B batch, T time, V = n_kv_head * head_dim.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.layers import rms_norm
from bov_lightning.model.lookup import is_own, source_class
from bov_lightning.model.transformer import Transformer
from bov_lightning.model.values import ValueSource
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups

ROW = 512
"""Tokens of the trial's training rows at most, whose windows are 128 tokens."""

LONGEST = 700
"""Tokens of the trial's texts at most."""

TOLERANCE = 1e-3
"""Of normed streams that should be equal: rounding is a hundredth of it."""

_passed: set[str] = set()
"""Classes and shapes that have been tried: a sweep asks for each of its runs."""


def try_own_source(config: TransformerConfig) -> None:
    """Refuses a value source from outside of the package that would train or decode wrongly.

    Costs nothing for those of the package, and about a second for others.

    Raises:
        UserError: what is wrong with the class, and what to change.
    """
    source = source_class(config.value.source)
    known = f"{id(source)} {config}"
    if not is_own(source) or known in _passed:
        return
    name = config.value.source
    _check_class(source, name)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = _build(config, name)
        _check_parameters(model, name)
        _add_noise(model)
        _check_shape(model, name)
        _check_gradients(model, name)
        _check_what_it_sees(model, name)
    _passed.add(known)


def _check_class(source: type[ValueSource], name: str) -> None:
    if source.forward is ValueSource.forward:
        raise UserError(f"value.source {name} has no forward, which gives the values")
    if not source.value_cache and source.attend_past is ValueSource.attend_past:
        raise UserError(
            f"value.source {name} has value_cache = False but no attend_past, so nothing could be "
            "decoded: write it, or leave value_cache out"
        )
    try:
        inspect.signature(source).bind(None)
    except TypeError as error:
        raise UserError(
            f"value.source {name}: its __init__ takes the network's configuration alone ({error}): "
            "settings are read from config.value.args, see args_class"
        ) from None


def _build(config: TransformerConfig, name: str) -> Transformer:
    """The network of so many layers and heads, narrow and with short windows where that fits."""
    least = max(24 / config.n_head, config.value.gate_channels / config.n_kv_head, 2)
    d_model = min(config.d_model, config.n_head * 2 * -int(-least // 2))
    try:
        row = min(config.sequence_len, ROW)
        narrow = Transformer(replace(config, d_model=d_model, d_mlp=16, sequence_len=row))
    except Exception:
        # Its shape may be part of what the source asks for.
        narrow = Transformer(config)
    return narrow.eval()


def _sources(model: Transformer) -> Iterator[tuple[str, ValueSource]]:
    """(name of its parameters' prefix, source) of each that is somebody's own."""
    for i, block in enumerate(model.blocks):
        source = block.attention.value.source
        if source is not None and is_own(type(source)):
            yield f"blocks.{i}.attention.value.source.", source


def _check_parameters(model: Transformer, name: str) -> None:
    build_groups(model, OptimizerConfig(), model.config, 1)
    matrices = {path: p for path, p, group, _ in model.rated_parameters() if group == "matrix"}
    for prefix, source in _sources(model):
        own = {path.removeprefix(prefix): p for path, p in matrices.items() if path in {
            prefix + parameter for parameter, _ in source.named_parameters()
        }}  # fmt: skip
        if sum(p.numel() for p in own.values()) > source.matmul_parameters():
            raise UserError(
                f"value.source {name}: Muon would train {', '.join(own)} as matrices, but "
                "matmul_parameters does not count them all: count what a token is multiplied with, "
                'and name what is looked up by row in optimizer_groups, as {"NAME": "table"}'
            )
        for module in source.modules():
            for lost in module._non_persistent_buffers_set:
                raise UserError(
                    f"value.source {name}: the buffer {lost} would be in no checkpoint: register "
                    "it with persistent=True, and fill it in initialise"
                )


@torch.no_grad()
def _add_noise(model: Transformer) -> None:
    """Output projections, coefficients and the source's own parameters start at zero or alike."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        deviation = 0.0
        if name.endswith("output.weight"):
            deviation = 0.1
        elif name == "head.weight" or ".value.source." in name:
            deviation = 0.3
        elif name.endswith("coefficient"):
            deviation = 0.2
        if deviation and p.is_floating_point():
            p.add_(torch.empty_like(p).normal_(0, deviation, generator=generator))
    model.smear.strength.fill_(0.5)


def _text(model: Transformer) -> Tensor:
    """Token ids (2, T), beyond the window of each layer where that is not too long."""
    config = model.config
    windows = [window + 40 for window in config.windows if window is not None]
    n_token = min(max([60, *windows]), LONGEST)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.vocab_size, (2, n_token), generator=generator)
    if config.document_start is not None:
        ids[ids == config.document_start] = (config.document_start + 1) % config.vocab_size
        ids[0, [0, 9, n_token // 2]] = ids[1, [0, n_token // 3]] = config.document_start
    return ids


@contextmanager
def _watched(model: Transformer, name: str) -> Iterator[None]:
    """Looks at what each source gives before anybody uses it."""
    n_row, width = 2, model.config.d_value

    def look(source: ValueSource, inputs: tuple, value: object) -> None:
        n_token = inputs[0].token_ids.shape[1]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (n_row, n_token, width):
            raise UserError(
                f"value.source {name} gives values of shape {shape} for {n_row} texts of {n_token} "
                f"tokens in a narrow network; they must be (B, T, n_kv_head * head_dim), there "
                f"{(n_row, n_token, width)}"
            )

    hooks = [source.register_forward_hook(look) for _, source in _sources(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _check_shape(model: Transformer, name: str) -> None:
    with _watched(model, name):
        logits = model(_text(model)[:, :9])
    if not logits.isfinite().all():
        raise UserError(f"value.source {name} gives values that are not finite")


def _check_gradients(model: Transformer, name: str) -> None:
    ids = _text(model)[:, :33]
    model(ids[:, :-1], ids[:, 1:]).backward()
    for prefix, source in _sources(model):
        for parameter, p in source.named_parameters():
            if p.requires_grad and p.grad is None:
                raise UserError(
                    f"value.source {name}: nothing depends on {prefix}{parameter}, which therefore "
                    "would not be trained"
                )
    model.zero_grad()


@torch.no_grad()
def _check_what_it_sees(model: Transformer, name: str) -> None:
    """By the stream after the last block: logits of a large vocabulary would take gigabytes."""

    def stream(ids: Tensor, **options) -> Tensor:
        return rms_norm(model.stream(ids, **options))

    ids = _text(model)
    n_token = ids.shape[1]
    whole = stream(ids)

    half = n_token // 2
    other = ids.clone()
    other[:, half:] = (other[:, half:] + 1) % model.config.vocab_size
    if _differ(stream(other)[:, :half], whole[:, :half]):
        raise UserError(
            f"value.source {name} lets a token see those that come after it: its values depend on "
            "later tokens"
        )

    start = model.config.document_start
    if start is not None:
        first = int((ids[0] == start).nonzero()[-1])
        alone = stream(ids[:1, first:])
        if _differ(alone, whole[:1, first:]):
            raise UserError(
                f"value.source {name} reaches across the start of a document, which nothing else "
                "of the network does"
            )

    pieces = (half, 1, 1, 7, n_token - half - 9)
    cache = model.new_cache(2, n_token)
    cached = torch.cat([stream(x, cache=cache) for x in ids.split(pieces, dim=1)], dim=1)
    if _differ(cached, whole):
        raise UserError(
            f"value.source {name} decodes otherwise than it trains: a text that is fed in pieces, "
            "as to a cache, does not come out as the whole does. A value may depend on its own "
            "token and layer alone: inputs.token_ids are the new tokens when decoding, neighbours "
            "come from inputs.ngrams"
        )


def _differ(found: Tensor, expected: Tensor) -> bool:
    return not bool(((found - expected).abs() <= TOLERANCE).all())
