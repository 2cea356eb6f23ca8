"""Value tables in the host's memory or in the file: the same tokens, less memory."""

import json
from pathlib import Path

import pytest
import torch
from forks import Call
from measure_memory import resident
from variants import OVERLAYS, WAYS, make_model, mostly_slow, perturb, token_ids

import bov_lightning
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.inference.decoding import Decoding
from bov_lightning.inference.generate import table_bytes
from bov_lightning.inference.sampling import Sampling
from bov_lightning.interop.hf_export import export
from bov_lightning.model.lookup import class_path
from bov_lightning.model.values import BankOfValues

BANKS = [name for name in WAYS if OVERLAYS[name]["source"] == "bank"]


def write(folder, name, **shape):
    model = perturb(make_model(OVERLAYS[name], **shape), smear=0.9)
    write_checkpoint(folder / "checkpoint", 1, model.state_dict(), config_yaml(model.config))
    return folder / "checkpoint"


def tokens_of(model) -> list[list[int]]:
    decoding = Decoding(model, [[3] * 5 + [8], list(range(60))], Sampling(30, temperature=0))
    while any(decoding.running):
        decoding.step()
    return decoding.new


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", mostly_slow(BANKS, {"bov", "bov_shared_table"}))
@torch.no_grad()
def test_offloaded_banks_compute_the_same(name, tmp_path, device):
    checkpoint = write(tmp_path, name)
    plain, _ = bov_lightning.load(checkpoint, device=device)
    ids = token_ids(300).to(device)
    expected, tokens = plain(ids), tokens_of(plain)
    for where in ("cpu", "mmap"):
        model, _ = bov_lightning.load(checkpoint, device=device, bank_device=where)
        assert not any(parameter.endswith("table") for parameter, _ in model.named_parameters())
        assert table_bytes(model) == table_bytes(plain) > 0
        assert torch.equal(model(ids), expected)
        assert tokens_of(model) == tokens

        cache = model.new_cache(2, 300)
        pieces = [model(piece, cache=cache) for piece in ids.split((150, 1, 1, 148), dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-4)
        branch = cache.select([1, 0])
        with pytest.raises(UserError):
            model(ids[:, :1], cache=branch)


@torch.no_grad()
def test_a_selected_cache_fetches_rows_of_its_own(tmp_path):
    model, _ = bov_lightning.load(write(tmp_path, "bov"), bank_device="mmap")
    cache = model.new_cache(1, 40)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    branches = [cache.select([0, 0]), cache.select([0])]
    for branch, new in zip(branches, (4, 5), strict=True):
        piece = torch.tensor([[new, 1, new + 2]] * branch.batch_size)
        whole = torch.tensor([[1, 2, 3, new, 1, new + 2]])
        found = model(piece, cache=branch)[0]
        assert torch.allclose(found, model(whole)[0, 3:], atol=1e-5)
    fetched = [
        sorted(branch.slots.slot_of_row[:10].ge(0).nonzero()[:, 0].tolist()) for branch in branches
    ]
    assert fetched == [[1, 2, 3, 4, 6], [1, 2, 3, 5, 7]]
    assert cache.slots.n_used == 3


@pytest.mark.slow
@torch.no_grad()
def test_exports_and_half_precision(tmp_path):
    checkpoint = write(tmp_path, "bov")
    export(checkpoint, tmp_path / "export")
    ids = token_ids(50)
    for path in (checkpoint, tmp_path / "export"):
        plain, _ = bov_lightning.load(path, dtype=torch.bfloat16)
        for where in ("cpu", "mmap"):
            model, _ = bov_lightning.load(path, dtype=torch.bfloat16, bank_device=where)
            assert torch.equal(model(ids), plain(ids))


def test_unknown_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="bank_device"):
        bov_lightning.load(write(tmp_path, "bov"), bank_device="disk")


class Halved(BankOfValues):
    """A bank that reads its table itself."""

    def forward(self, inputs, projection):
        return 0.5 * torch.nn.functional.embedding(inputs.token_ids, self.table)


@pytest.mark.parametrize("where", ["cpu", "mmap"])
@pytest.mark.parametrize("source", ["low_rank_bank.LowRankBank", class_path(Halved)])
def test_tables_that_must_stay_are_not_left_elsewhere(source, where, tmp_path):
    model = make_model({"source": source, "layers": "last_third", "coefficient": "learned"})
    write_checkpoint(tmp_path / "checkpoint", 1, model.state_dict(), config_yaml(model.config))
    plain, _ = bov_lightning.load(tmp_path / "checkpoint")
    assert table_bytes(plain) == sum(t.nbytes for t in model.grouped_parameters()["table"])
    with pytest.raises(UserError, match="keeps its tables on the device"):
        bov_lightning.load(tmp_path / "checkpoint", bank_device=where)


def decode(checkpoint: Path, where: str | None, found: Path) -> None:
    """Writes the resident bytes after decoding, those of the tables, and the tokens."""
    model, _ = bov_lightning.load(checkpoint, bank_device=where)
    decoding = Decoding(model, [list(range(1, 100))], Sampling(20, temperature=0))
    while any(decoding.running):
        decoding.step()
    found.write_text(json.dumps([resident("VmRSS"), table_bytes(model), decoding.new]))


@pytest.mark.slow
def test_resident_memory_is_lower_by_the_tables(tmp_path):
    """Processes of their own, whose tables of 64 MiB are most of what they hold."""
    checkpoint = write(tmp_path, "bov", d_model=128, n_kv_head=4, vocab_size=65536)

    def measure(where: str | None) -> tuple[int, int, list]:
        found = tmp_path / "found.json"
        with Call(decode, checkpoint, where, found) as process:
            assert process.wait() == 0, process.err
        return json.loads(found.read_text())

    (plain, tables, tokens), (mapped, _, same) = measure(None), measure("mmap")
    assert tokens == same
    assert tables == 2 * 65536 * 128 * 4
    assert plain - mapped > 0.9 * tables
