"""The paths of a GPU, without one: variants of every way train and decode in tensors on "cuda".

What is left on the CPU, waits for the GPU, or takes a way that is the CPU's, is found here.
"""

from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
from fake_gpu import CUDA, fake_gpu
from variants import OVERLAYS, WAYS, make_model, mostly_slow

from bov_lightning.distributed import host_tables
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.inference.graph import FixedCache
from bov_lightning.model import kernels, matmul
from bov_lightning.model.values import BankOfValues
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

FAST = {"bov"}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="GPUs have Triton: pip install 'bov-lightning[triton]'"
)


def model_on_cuda(name: str, **shape):
    with torch.device(CUDA):
        return make_model(OVERLAYS[name], n_layer=3, **shape)


def cpu_products(watch) -> list[str]:
    """Operations of the CPU's other library."""
    names = ("mkldnn", f"{matmul.OPERATORS}.multiply")
    return [found for found in watch.operations if found.startswith(names)]


def train(model, n_micro: int = 1) -> None:
    """A step as `BoVModule` and Lightning take it."""
    groups = build_groups(model, OptimizerConfig(), model.config, 0)
    optimizer = MuonAdamW(groups)
    rows = torch.zeros(2, 141, dtype=torch.int64, device=CUDA)
    for _ in range(n_micro):
        (model(rows[:, :-1], rows[:, 1:]) / n_micro).backward()
    optimizer.step()
    assert optimizer.n_skipped == 0
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    assert {t.device for t in tensors} == {CUDA}


@pytest.mark.parametrize("name", mostly_slow(OVERLAYS, FAST, outside=False))
def test_a_step_of_training_waits_for_the_gpu_once(monkeypatch, name):
    """The optimizer reads the gradients' norm; nothing else does, and nothing lies on the CPU."""
    first = name in FAST
    # As on a machine whose CPU would multiply by oneDNN.
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", True)
    with fake_gpu() as watch:
        model = model_on_cuda(name, document_start=0 if first else None)
        watch.waits.clear()  # weights are drawn on the CPU
        train(model, n_micro=1 + first)
    assert watch.waits == ["item"]
    assert not cpu_products(watch)


def test_tables_on_the_host_wait_for_the_gpu_where_it_is_meant(monkeypatch):
    """Row numbers come to the host once per micro-step, for all layers; gradients of rows once per
    table. Nothing waits for what goes the other way."""
    # Which rows there are cannot be known; as many as there are numbers.
    monkeypatch.setattr(host_tables, "distinct", lambda ids: (ids.flatten(), torch.zeros_like(ids)))
    with fake_gpu() as watch:
        model = model_on_cuda("bov_every_second")
        tables = host_tables.keep_tables_on_host(model, Ranks())
        assert len(tables.tables) == 2
        assert {p.device.type for p in host_tables.host_parameters(model).values()} == {"cpu"}
        ids = torch.zeros(2, 141, dtype=torch.int64, device=CUDA)
        watch.waits.clear()
        for n_micro in range(1, 3):
            model(ids[:, :-1], ids[:, 1:]).backward()
            assert {table.rows.device for table in tables.tables} == {CUDA}
            assert len(watch.waits) == 1 + 3 * (n_micro - 1)
        _, gradients = tables.take_gradients()
        assert watch.waits == ["a copy to the CPU"] * (2 * (1 + len(tables.tables)))
        assert {gradient.device.type for gradient in gradients} == {"cpu"}


@needs_triton
@pytest.mark.parametrize("name", mostly_slow(WAYS, FAST, outside=False))
def test_decoding_a_token_waits_for_nothing(name):
    """So that a CUDA graph can hold the step; the eager one does not wait either."""
    with fake_gpu() as watch, torch.no_grad():
        model = model_on_cuda(name)
        for document_start in (None, 0) if name in FAST else (None,):
            model.config.__dict__["document_start"] = document_start
            cache = model.new_cache(2, 200)
            ids = torch.zeros(2, 140, dtype=torch.int64, device=CUDA)
            model(ids, cache=cache)
            watch.waits.clear()
            model(ids[:, :1], cache=cache)
            fixed = FixedCache(cache)  # what a `StaticStep` captures
            fixed.take_over()
            assert model(ids[:, :1], cache=fixed).device == CUDA
            assert watch.waits == []


@needs_triton
def test_a_past_that_grows_is_attended_to_without_plans_for_its_length(monkeypatch):
    """cuDNN's kernel plans each new length for 40 ms, which whole rows alone are worth."""
    planned, calls = [], []

    def watched(*args, **kwargs):
        planned.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    # Patches within are taken back before those of `fake_gpu`.
    with torch.no_grad(), fake_gpu(), monkeypatch.context() as patch:
        for name in ("attend_kept", "attend_fused"):
            way = getattr(kernels, name)
            patch.setattr(
                kernels, name, lambda *args, way=way, name=name: calls.append(name) or way(*args)
            )
        model = model_on_cuda("bov")
        cache = model.new_cache(2, 40)
        seen = []
        for n_token in (20, 5, 1):
            model(torch.zeros(2, n_token, dtype=torch.int64, device=CUDA), cache=cache)
            seen.append((set(planned), calls.copy()))
            planned.clear()
    whole, piece, token = seen
    assert whole == ({True}, [])
    assert piece == ({False}, [])
    assert token[1] == ["attend_kept"] * 2 + ["attend_fused"]


@pytest.mark.slow
def test_what_lies_on_the_cpu_is_found(monkeypatch):
    def of_the_cpu(bank, inputs, projection):
        scale = torch.ones(bank.table.shape[1])
        return torch.nn.functional.embedding(inputs.token_ids, bank.table) * scale

    with fake_gpu():
        model = model_on_cuda("bov")
        monkeypatch.setattr(BankOfValues, "forward", of_the_cpu)
        with pytest.raises(RuntimeError, match="cpu"):
            train(model)


@pytest.mark.slow
def test_products_of_the_cpu_are_found(monkeypatch):
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(matmul, "_is_fp32_on_cpu", lambda x: True)
    with fake_gpu() as watch:
        train(model_on_cuda("standard"))
    assert cpu_products(watch) == ["mkldnn._linear_pointwise"]


@pytest.mark.parametrize(
    ("wait", "found"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "an index that is a mask"),
        (lambda x: x[torch.tensor([0])], "an index on the CPU"),
        (lambda x: x.cpu(), "a copy to the CPU"),
        (lambda x: torch.tensor([1.0], device=x.device), "a copy to the GPU"),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), "a copy to the GPU"),
        (lambda x: torch.ones(3).pin_memory().to(x.device), "a copy to the GPU"),
    ],
)
def test_what_waits_is_found(wait, found):
    with fake_gpu() as watch:
        x = torch.ones(3, device=CUDA)
        # Some give what a fake tensor cannot know.
        with suppress(RuntimeError):
            wait(x)
        assert watch.waits == [found]


def test_what_does_not_wait_is_not_found():
    with fake_gpu() as watch:
        x = torch.ones(3, device=CUDA)
        x += torch.ones(3).pin_memory().to(CUDA, non_blocking=True)
        x[torch.zeros(2, dtype=torch.int64, device=CUDA)] = 2.0
        assert watch.waits == []
