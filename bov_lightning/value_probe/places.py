"""Where a model's value vectors come to be, whatever its make; reading and replacing them there.

Shapes: B rows, T tokens, K value heads, D channels per head, H query heads.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bov_lightning.errors import UserError
from bov_lightning.model.transformer import Transformer

SOURCES = ("v_proj", "value", "qkv_proj", "c_attn", "Wqkv", "query_key_value")
"""What the module is called whose output holds the values."""
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "output")
"""What the matrix is called that takes what was attended to."""
FUSED = ("qkv_proj", "c_attn", "Wqkv", "query_key_value")

Layout = Literal["alone", "last", "per_head"]
"""How values lie in a module's output: it has nothing else, they follow queries and keys, or each
head has its query, key and value side by side."""

N_CHECKED = 8
"""Tokens that a layout is tried on."""


@dataclass(frozen=True)
class Place:
    """The values of one layer."""

    layer: int
    block: nn.Module
    """The whole layer."""
    attention: nn.Module
    """The part of it that gives the attention's output."""
    source: nn.Module
    output: nn.Module
    layout: Layout
    n_head: int
    """K."""
    head_dim: int
    """D."""
    cached: bool = True
    """Whether decoding keeps them."""

    @property
    def width(self) -> int:
        """K * D."""
        return self.n_head * self.head_dim

    def take(self, out: Tensor) -> Tensor:
        """The values (B, T, K, D) in the source's output."""
        heads = (self.n_head, self.head_dim)
        if self.layout == "per_head":
            return out.unflatten(-1, (self.n_head, 3 * self.head_dim))[..., 2 * self.head_dim :]
        return out[..., -self.width :].unflatten(-1, heads)

    def put(self, out: Tensor, values_BTKD: Tensor) -> Tensor:
        """The source's output with other values in it."""
        values_BTKD = values_BTKD.to(out.dtype)
        if self.layout == "per_head":
            rest = out.unflatten(-1, (self.n_head, 3 * self.head_dim))[..., : 2 * self.head_dim]
            return torch.cat((rest, values_BTKD), dim=-1).flatten(-2)
        return torch.cat((out[..., : -self.width], values_BTKD.flatten(-2)), dim=-1)


def find_places(model: nn.Module) -> list[Place]:
    """The values of every layer, in order.

    That they are found by name is checked by what they do: with the same vector for all tokens in
    their place, attention must give that vector.

    Raises:
        UserError: a model without value projections, with one that layers share, or with an
            attention that does more with values than to average them.
    """
    if isinstance(model, Transformer):
        places = _own_places(model)
        _check(model, places)
        return places
    blocks = _blocks(model)
    for layout in ("alone", "last", "per_head"):
        places = [_place(model, layer, block, layout) for layer, block in enumerate(blocks)]
        fused = any(_leaf(place.block, place.source) in FUSED for place in places)
        if fused == (layout == "alone"):
            continue
        try:
            _check(model, places)
            return places
        except _OtherLayoutError as error:
            problem = error
    raise UserError(
        f"{_name(model)} cannot be probed: with one value for all tokens, {problem}, so that its "
        "attention does more with values than to average them"
    )


class _OtherLayoutError(Exception):
    """Values do not lie as supposed."""


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _leaf(block: nn.Module, module: nn.Module) -> str:
    return next(n for n, m in block.named_modules() if m is module).rpartition(".")[2]


def _own_places(model: Transformer) -> list[Place]:
    config = model.config
    return [
        Place(
            layer, block, block.attention, block.attention.value, block.attention.output, "alone",
            config.n_kv_head, config.head_dim, block.attention.value.value_cache,
        )
        for layer, block in enumerate(model.blocks)
    ]  # fmt: skip


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of ``transformers``."""
    config = model.config.get_text_config(decoder=True)
    n_layer = getattr(config, "num_hidden_layers", None)
    found = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layer
    ]
    having = [blocks for blocks in found if any(_source_of(block) for block in blocks)]
    if not having:
        raise UserError(
            f"{_name(model)} has no value projections: its layers hold none of "
            f"{', '.join(SOURCES)} beside one of {', '.join(OUTPUTS)}"
        )
    (blocks, *_) = having
    without = [layer for layer, block in enumerate(blocks) if not _source_of(block)]
    if without:
        raise UserError(
            f"{_name(model)} has no value projection of its own in layer {without[0]}: only models "
            "with one in every layer can be probed"
        )
    return blocks


def _source_of(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """(attention, source, output) of a layer."""
    for name, module in block.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf in SOURCES and "cross" not in parent and "encoder" not in parent:
            attention = block.get_submodule(parent) if parent else block
            children = dict(attention.named_children())
            output = next((children[n] for n in OUTPUTS if n in children), None)
            if output is not None and output is not module:
                return attention, module, output
    return None


def _place(model: nn.Module, layer: int, block: nn.Module, layout: Layout) -> Place:
    attention, source, output = _source_of(block)
    config = model.config.get_text_config(decoder=True)
    n_query = config.num_attention_heads
    n_head = getattr(config, "num_key_value_heads", None) or n_query
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return Place(
        layer, block, attention, source, output, layout, n_head,
        head_dim or config.hidden_size // n_query,
    )  # fmt: skip


@torch.no_grad()
def _check(model: nn.Module, places: list[Place]) -> None:
    """See `find_places`."""
    shared = {}
    for place in places:
        if (other := shared.setdefault(place.source, place.layer)) != place.layer:
            raise UserError(
                f"layers {other} and {place.layer} of {_name(model)} share one value projection: "
                "only models with one in every layer can be probed"
            )
    device = next(model.parameters()).device
    same, seen, replaced = {}, {}, set()
    for place in places:
        vector = torch.linspace(-1, 1, place.width, device=device) * (1 + place.layer)
        same[place.layer] = vector.view(place.n_head, place.head_dim)

    def replace(place: Place, values_BTKD: Tensor) -> Tensor:
        replaced.add(place.layer)
        return same[place.layer].expand(*values_BTKD.shape[:2], -1, -1)

    def see(place: Place, attended: Tensor) -> None:
        seen[place.layer] = attended

    ids = torch.arange(1, N_CHECKED + 1, device=device)[None]
    ids = ids.clamp(max=_n_row(model) - 1)
    try:
        with values(places, replace), attended(places, see):
            call(model, ids)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise _OtherLayoutError(f"it cannot be computed ({detail})") from None
    for place in places:
        if place.layer not in replaced or place.layer not in seen:
            raise UserError(
                f"layer {place.layer} of {_name(model)} does not use its value projection, since "
                "it takes the values of another layer: such models cannot be probed"
            )
        expected, found = same[place.layer], seen[place.layer].float()
        n_group = found.shape[-1] // place.width
        if found.shape[-1] % place.width:
            raise _OtherLayoutError(f"layer {place.layer} attends to {found.shape[-1]} channels")
        expected = expected.repeat_interleave(n_group, dim=0).flatten()
        if not torch.allclose(found, expected.expand_as(found), rtol=0.02, atol=0.02):
            raise _OtherLayoutError(f"layer {place.layer} gives another one")


def _n_row(model: nn.Module) -> int:
    return len(embedding_of(model))


def embedding_of(model: nn.Module) -> Tensor:
    """The token embedding, (rows, C)."""
    if isinstance(model, Transformer):
        return model.embedding.weight
    return model.get_input_embeddings().weight


def call(model: nn.Module, ids_BT: Tensor) -> None:
    """Computes the model for what its hooks see."""
    with contextlib.suppress(EnoughError):
        if isinstance(model, Transformer):
            model.stream(ids_BT)
            return
        model(input_ids=ids_BT, **({"use_cache": False} if _has_cache(model) else {}))


def _has_cache(model: nn.Module) -> bool:
    return hasattr(model.config.get_text_config(decoder=True), "use_cache")


class EnoughError(Exception):
    """Ends a call of the model: what follows is not needed."""


@contextlib.contextmanager
def values(places: list[Place], see: Callable[[Place, Tensor], Tensor | None]) -> Iterator[None]:
    """Shows ``see`` the values (B, T, K, D) of each place as they come to be.

    What it returns takes their place; None leaves them.
    """

    def hook(place: Place):
        def run(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor | None:
            other = see(place, place.take(out))
            return None if other is None else place.put(out, other)

        return place.source.register_forward_hook(run)

    with _removing([hook(place) for place in places]):
        yield


@contextlib.contextmanager
def attended(places: list[Place], see: Callable[[Place, Tensor], Tensor | None]) -> Iterator[None]:
    """Shows ``see`` what each place has attended to, (B, T, H * D), before the output's matrix.

    What it returns goes on in its place.
    """

    def hook(place: Place):
        def run(module: nn.Module, inputs: tuple) -> tuple | None:
            other = see(place, inputs[0])
            return None if other is None else (other, *inputs[1:])

        return place.output.register_forward_pre_hook(run)

    with _removing([hook(place) for place in places]):
        yield


@contextlib.contextmanager
def after(
    places: list[Place], part: Literal["block", "attention"],
    see: Callable[[Place, nn.Module, tuple, dict, Any], None],
) -> Iterator[None]:  # fmt: skip
    """Shows ``see`` each place's layer, or attention: module, arguments and output."""

    def hook(place: Place):
        def run(module: nn.Module, inputs: tuple, named: dict, out: Any) -> None:
            see(place, module, inputs, named, out)

        return getattr(place, part).register_forward_hook(run, with_kwargs=True)

    with _removing([hook(place) for place in places]):
        yield


@contextlib.contextmanager
def replayed(outputs: list[tuple[Place, Any]]) -> Iterator[None]:
    """Layers that give what they are said to have given, and compute nothing."""

    def replay(out: Any) -> Callable:
        return lambda *inputs, **named: out

    # An attribute of the instance stands before the method of the class.
    for place, out in outputs:
        place.block.__dict__["forward"] = replay(out)
    try:
        yield
    finally:
        for place, _ in outputs:
            place.block.__dict__.pop("forward", None)


@contextlib.contextmanager
def _removing(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
