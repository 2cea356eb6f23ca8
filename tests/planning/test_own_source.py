"""A value source of somebody's own is tried before anything trains: its mistakes are one line each.

`spoilt` has sources whose mistakes only show in what they compute; those here show by their form.
"""

from importlib import import_module

import pytest
import spoilt
import torch
import variants
from torch import nn
from variants import OUTSIDE, OVERLAYS, SMALL, mostly_slow

from bov_lightning.errors import UserError
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.planning import own_source
from bov_lightning.planning.own_source import try_own_source


def config_of(source: str, **shape) -> TransformerConfig:
    value = ValueConfig(source, "last_third", "learned")
    shape = SMALL | {"sequence_len": 512, "document_start": 0} | shape
    return TransformerConfig(**shape, value=value)


SPOILT = {
    "NextToken": ("model.test_values.test_a_later_token_never_changes_an_earlier_logit", (),
                  "depends? on later tokens"),
    "AcrossDocuments": ("model.test_values.test_masked_documents_do_not_see_each_other", (),
                        "across the start of a document"),
    "Neighbour": ("model.test_cache.test_pieces_equal_the_whole", ("windows",),
                  "decodes otherwise than it trains.*inputs.ngrams"),
}  # fmt: skip
"""By class: the test of variants that names its mistake, that one's further arguments, and what the
trial says."""


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_source_is_refused_before_training(name):
    with pytest.raises(UserError, match=SPOILT[name][2]):
        try_own_source(config_of(f"spoilt.{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILT)
def test_the_tests_of_variants_catch_a_spoilt_source(name, monkeypatch):
    """Though its rows start at zero; without the mistake the same test passes."""
    where, arguments, _ = SPOILT[name]
    module, _, function = where.rpartition(".")
    test = getattr(import_module(module), function)
    for cls in ("Right", name):
        value = {"source": f"spoilt.{cls}", "layers": "last_third", "coefficient": "learned"}
        monkeypatch.setitem(variants.OVERLAYS, cls, value)
    test("Right", *arguments)
    with pytest.raises(AssertionError):
        test(name, *arguments)


@pytest.mark.parametrize("name", mostly_slow([*OUTSIDE, "spoilt.Right"], {"spoilt.Right"}))
def test_a_right_source_is_tried_once_and_passes(name, monkeypatch):
    source = OVERLAYS[name]["source"] if name in OVERLAYS else name
    monkeypatch.setattr(own_source, "_passed", set())
    before = torch.get_rng_state()
    for start in (0, None):
        try_own_source(config_of(source, document_start=start, window_pattern="SL"))
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(own_source, "_build", None)
    try_own_source(config_of(source, document_start=0, window_pattern="SL"))


def test_sources_of_the_package_cost_nothing(monkeypatch):
    monkeypatch.setattr(own_source, "_check_class", None)
    try_own_source(config_of("bank"))


# Mistakes of form: each class has one.


class NoForward(spoilt.ValueSource):
    pass


class NothingToDecode(spoilt.Right):
    value_cache = False


class TwoArguments(spoilt.Right):
    def __init__(self, config, n_row):
        super().__init__(config)


class NotFilled(spoilt.Right):
    def initialise(self, values, prefix, embedding, fill):
        nn.init.zeros_(self.table)


class FilledWrongly(spoilt.Right):
    def initialise(self, values, prefix, embedding, fill):
        fill.fill(self.table, torch.zeros(1, self.table.shape[1]))


class NoSuchGroup(spoilt.Right):
    optimizer_groups = {"table": "tables"}


class TableForMuon(spoilt.Right):
    optimizer_groups = {}


class Vector(spoilt.Right):
    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.empty(config.d_value))

    def initialise(self, values, prefix, embedding, fill):
        super().initialise(values, prefix, embedding, fill)
        fill.constant(self.bias, 0)

    def forward(self, inputs, projection):
        return super().forward(inputs, projection) + self.bias


class Unused(Vector):
    optimizer_groups = {"table": "table", "bias": "table"}

    def forward(self, inputs, projection):
        return spoilt.Right.forward(self, inputs, projection)


class NegativeRate(spoilt.Right):
    optimizer_groups = {"table": ("table", -1.0)}


class WrongShape(spoilt.Right):
    def forward(self, inputs, projection):
        return super().forward(inputs, projection)[..., :-2]


class NoTensor(spoilt.Right):
    def forward(self, inputs, projection):
        return None


class NotFinite(spoilt.Right):
    def forward(self, inputs, projection):
        return super().forward(inputs, projection) / 0


class LostBuffer(spoilt.Right):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("order", torch.arange(3), persistent=False)

    def initialise(self, values, prefix, embedding, fill):
        super().initialise(values, prefix, embedding, fill)
        fill.fill(self.order, torch.arange(3))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (NoForward, "has no forward"),
        (NothingToDecode, "value_cache = False but no attend_past"),
        (TwoArguments, "missing a required argument: 'n_row'.*config.value.args"),
        (NotFilled, r"blocks.4.attention.value.source.table holds whatever was in memory"),
        (FilledWrongly, r"of shape \(128, \d+\) cannot be filled with numbers of shape"),
        (NoSuchGroup, r"source.table into 'tables', which is no group: use one of head"),
        (TableForMuon, r"Muon would train table as matrices.*\"table\""),
        (Vector, "source.bias has 1 dimensions and is in no optimizer group"),
        (Unused, "nothing depends on blocks.4.attention.value.source.bias"),
        (NegativeRate, "multiplies the rate of blocks.4.attention.value.source.table by -1.0"),
        (WrongShape, r"values of shape \(2, 9, 10\) .* there \(2, 9, 12\)"),
        (NoTensor, "values of shape NoneType"),
        (NotFinite, "not finite"),
        (LostBuffer, "the buffer order would be in no checkpoint"),
    ],
)
def test_a_mistake_is_one_line(cls, words):
    with pytest.raises(UserError, match=words) as error:
        try_own_source(config_of(f"{__name__}.{cls.__name__}"))
    assert "\n" not in str(error.value)
