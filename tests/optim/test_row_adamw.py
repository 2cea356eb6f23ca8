"""Tables in the host's memory: the same training where all rows are touched, and AdamW by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bov_lightning.distributed.host_tables import (
    TablesOnHost,
    TrainedTable,
    keep_tables_on_host,
)
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import write_part
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim import row_adamw
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

NGRAMS = {"n_row": 31, "reach": 2, "factor": 0.5}
VALUES = {
    "bank": ValueConfig("bank", "last_third", "learned"),
    "shared": ValueConfig("bank", "second_half", "learned", shared=True),
    "gated": ValueConfig("bank", "last_third", "gate", add_context=True, gate_inputs="x_and_row"),
    "ngram_bank": ValueConfig("ngram_bank", "last_third", source_args=NGRAMS),
}
N_STEP, N_MICRO = 2, 2


def config_of(value: ValueConfig, d_model: int = 36) -> TransformerConfig:
    """No row has a width that vectors of a processor divide."""
    return TransformerConfig(
        n_layer=4, n_head=3, n_kv_head=3, d_model=d_model, vocab_size=64, sequence_len=64,
        value=value,
    )  # fmt: skip


def objects(
    config: TransformerConfig, on_host: bool, ranks: Ranks = Ranks()
) -> tuple[Transformer, MuonAdamW]:
    """Not sharded: a model and its optimizer, as `BoVModule` makes them."""
    with torch.device("meta" if on_host else "cpu"):
        model = Transformer(config)
    tables = None
    if on_host:
        tables = keep_tables_on_host(model, ranks)
        model.to_empty(device="cpu")
        model.initialise(Initialiser(0, write_part))
    rates = OptimizerConfig(muon_dtype="float32")
    return model, MuonAdamW(build_groups(model, rates, config, 0), tables)


def all_rows(generator: torch.Generator, n_row: int) -> Tensor:
    """Texts in which every token occurs; in a few of them every n-gram's row does too."""
    rows = [torch.randperm(64, generator=generator) for _ in range(n_row)]
    return torch.stack([torch.cat((row, row[:1])) for row in rows])


def train(model: Transformer, optimizer: MuonAdamW) -> list[float]:
    """Some steps of several micro-steps; the gradients' norms."""
    generator, norms = torch.Generator().manual_seed(0), []
    for _ in range(N_STEP):
        for _ in range(N_MICRO):
            rows = all_rows(generator, 8)
            (model(rows[:, :-1], rows[:, 1:]) / N_MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.gradient_norm)
    return norms


@pytest.mark.parametrize("name", VALUES)
def test_all_rows_touched_give_the_bits_of_a_table_on_the_device(name):
    config = config_of(VALUES[name])
    (plain, dense), (model, optimizer) = (objects(config, on_host) for on_host in (False, True))
    assert train(model, optimizer) == pytest.approx(train(plain, dense), rel=1e-6)
    expected = dict(plain.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[key]), key
        for kind, state in dense.state[expected[key]].items():
            assert torch.equal(optimizer.state[parameter][kind], state), (key, kind)
    tables = [p for p in optimizer.state if "row_updates" in optimizer.state[p]]
    assert tables
    for table in tables:
        assert (optimizer.state[table]["row_updates"] == N_STEP).all()


GROUP = {"kind": "adamw", "lr": 0.1, "betas": (0.8, 0.995), "eps": 1e-10, "weight_decay": 0.3}
N_ROW, WIDTH = 7, 16
ROWS = st.lists(st.integers(0, N_ROW - 1), max_size=4)


def one_table() -> tuple[TrainedTable, MuonAdamW]:
    tables = TablesOnHost(torch.Size((N_ROW, WIDTH)), Ranks(), torch.float32)
    table = TrainedTable(tables, torch.Size((N_ROW, WIDTH)))
    tables.tables.append(table)
    torch.nn.init.normal_(table.parameter, generator=torch.Generator().manual_seed(0))
    other = torch.nn.Parameter(torch.zeros(1))
    other.grad = torch.zeros(1)
    return table, MuonAdamW([{**GROUP, "params": [table.parameter, other]}], tables)


def backward(table: TrainedTable, ids: list[int], weight_NW: Tensor) -> None:
    """Of a loss whose gradient for the looked up rows is the weight."""
    ids = torch.tensor(ids, dtype=torch.int64)
    table.tables.fetch(ids)
    (table.look_up(ids, weight_NW) * weight_NW).sum().backward()


@settings(max_examples=20)
@given(st.lists(st.lists(ROWS, min_size=1, max_size=3), min_size=1, max_size=6), st.data())
def test_each_row_is_trained_by_an_adamw_of_its_own(steps, data):
    """torch's, which is called at the steps that touch the row and at no others."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    table, optimizer = one_table()
    whole = table.parameter.detach()
    own = [torch.nn.Parameter(row.clone()) for row in whole]
    optimizers = [
        torch.optim.AdamW([row], **{k: v for k, v in GROUP.items() if k != "kind"}, fused=True)
        for row in own
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_adamw, "ROWS_AT_ONCE", data.draw(st.integers(1, N_ROW)))
        for number, micro_steps in enumerate(steps):
            rate = GROUP["lr"] / (1 + number)
            optimizer.param_groups[0]["lr"] = rate
            touched, squares = set(), 0.0
            for ids in micro_steps:
                weight_NW = torch.randn(len(ids), WIDTH, generator=generator)
                backward(table, ids, weight_NW)
                added = torch.zeros(N_ROW, WIDTH)
                added.index_add_(0, torch.tensor(ids, dtype=torch.int64), weight_NW)
                for i in set(ids):
                    own[i].grad = added[i] if own[i].grad is None else own[i].grad + added[i]
                touched |= set(ids)
            for i in touched:
                squares += own[i].grad.double().square().sum().item()
                optimizers[i].param_groups[0]["lr"] = rate
                optimizers[i].step()
                own[i].grad = None
            optimizer.step()
            assert optimizer.gradient_norm == pytest.approx(squares**0.5, rel=1e-5)
    for i, row in enumerate(own):
        assert torch.equal(whole[i], row), i
        state, expected = optimizer.state[table.parameter], optimizers[i].state[row]
        assert state["row_updates"][i] == expected.get("step", 0)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[kind][i], expected.get(kind, torch.zeros(WIDTH)))


def test_a_row_first_seen_late_makes_the_first_step_of_a_fresh_adamw():
    """Whole tables divide by the run's step instead: there it moves 2.8 times as far."""
    table, optimizer = one_table()
    before = table.parameter.detach().clone()
    for _ in range(30):
        backward(table, [0, 1], torch.ones(2, WIDTH))
        optimizer.step()
    assert torch.equal(table.parameter[2:], before[2:])
    backward(table, [5], torch.full((1, WIDTH), 0.01))
    optimizer.step()
    moved = table.parameter[5] - (1 - 0.1 * 0.3) * before[5]
    torch.testing.assert_close(moved, torch.full((WIDTH,), -0.1))
    assert torch.equal(table.parameter[[2, 3, 4, 6]], before[[2, 3, 4, 6]])


def test_a_step_that_is_not_finite_leaves_the_rows_and_nothing_of_its_gradient():
    table, optimizer = one_table()
    before = table.parameter.detach().clone()
    backward(table, [1, 2], torch.full((2, WIDTH), torch.nan))
    optimizer.step()
    assert optimizer.n_skipped == 1
    assert torch.equal(table.parameter, before)
    backward(table, [1], torch.ones(1, WIDTH))
    optimizer.step()
    assert optimizer.gradient_norm == WIDTH**0.5
    assert torch.equal(table.parameter[2:], before[2:])
    assert not torch.equal(table.parameter[1], before[1])


def test_gradients_of_another_micro_step_are_refused():
    table, _ = one_table()
    ids, weight_NW = torch.tensor([1, 2]), torch.ones(2, WIDTH)
    table.tables.fetch(ids)
    values = table.look_up(ids, weight_NW)
    table.tables.fetch(ids + 1)
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        values.sum().backward()


def test_corrections_that_are_one_in_double_precision_are_one_kind_of_rows(monkeypatch):
    """Rows of long runs, all updated another number of times, go to the kernel together."""
    found = []
    table, optimizer = one_table()
    monkeypatch.setattr(row_adamw, "step_adamw", lambda rows, *_: found.append(len(rows)))
    optimizer.create_state()
    counts = optimizer.state[table.parameter]["row_updates"]
    counts.copy_(torch.tensor([3.0, 3, 5, 8000, 9000, 10_000, 11_000]))
    backward(table, list(range(N_ROW)), torch.ones(N_ROW, WIDTH))
    optimizer.step()
    assert found == [3]
    assert counts.tolist() == [4, 4, 6, 8001, 9001, 10_001, 11_001]
