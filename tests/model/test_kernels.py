"""The Triton kernel equals the PyTorch path, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bov-lightning[triton]'")

from bov_lightning.model import kernels
from bov_lightning.model.attention import attention_scale
from bov_lightning.model.decode import attend_gathered

pytestmark = pytest.mark.gpu


SIZES = [(1, 1, 16), (2, 63, 16), (1, 700, 24), (3, 129, 32)]
HEADS = [(4, 4), (6, 2)]


# Each pair of a size, a number of heads and a mask is there, half of them in the slow suite.
@pytest.mark.parametrize(
    ("n_row", "n_past", "head_dim", "heads", "masked"),
    [
        pytest.param(*size, HEADS[(i + masked) % 2], masked,
                     marks=[pytest.mark.slow] if i // 2 == masked else [])
        for i, size in enumerate(SIZES)
        for masked in (False, True)
    ],
)  # fmt: skip
def test_the_kernel_equals_the_reference(
    monkeypatch, device, n_row, n_past, head_dim, heads, masked
):
    """Few programs, so that some read several blocks; the last part is shorter."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4 * n_row * heads[0])
    generator = torch.Generator().manual_seed(n_past)
    q = torch.randn(n_row, heads[0], 1, head_dim, generator=generator)
    room = torch.randn(n_row, heads[1], n_past + 9, head_dim, generator=generator)
    ids = torch.randint(0, 40, (n_row, n_past), generator=generator)
    table = torch.randn(40, heads[1] * head_dim, generator=generator)
    mask = None
    if masked:
        # The first hundred are hidden, so that whole parts see nothing.
        mask = torch.rand(n_row, 1, 1, n_past, generator=generator) < 0.7
        mask[..., : min(100, n_past - 1)] = False
        mask[..., -1] = True
    arguments = [q, room[:, :, :n_past], ids, table, mask]
    arguments = [None if x is None else x.to(device) for x in arguments]
    expected = attend_gathered(*arguments)
    assert torch.allclose(kernels.attend_fused(*arguments), expected, atol=1e-5)
    q, k, ids, table, mask = arguments
    kept = table[ids].unflatten(-1, (heads[1], -1)).transpose(1, 2)
    assert torch.allclose(kernels.attend_kept(q, k, kept, mask), expected, atol=1e-5)


class Recorder:
    """A kernel, and with what it was called: all that decides whether it is compiled again."""

    def __init__(self, kernel):
        self.kernel, self.kinds = kernel, set()
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        self.growing = options["do_not_specialize"]
        self.moving = options.get("do_not_specialize_on_alignment") or []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            names = self.kernel.arg_names
            kinds = [
                ("growing", name) if name in self.growing
                else (name, x.dtype, name in self.moving or x.data_ptr() % 16 == 0)
                if isinstance(x, torch.Tensor)
                # Triton compiles ones, and multiples of 16, apart.
                else (name, type(x), x == 1, x % 16 == 0)
                for name, x in zip(names, args, strict=False)
            ]  # fmt: skip
            self.kinds.add((*kinds, *constants.items()))
            return self.kernel[grid](*args, **constants)

        return launch


def test_kernels_are_compiled_once_whatever_the_length_is(monkeypatch, device):
    recorder = Recorder(kernels.attend_split)
    monkeypatch.setattr(kernels, "attend_split", recorder)
    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    q, k = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 260, 16)
    ids, table = torch.randint(0, 40, (2, 260)), torch.randn(40, 32)
    mask = torch.ones(2, 1, 1, 260, dtype=torch.bool)
    q, k, ids, table, mask = (x.to(device) for x in (q, k, ids, table, mask))
    for n_past in (1, 2, 15, 16, 17, 64, 128, 259):
        # The last so many, as a window has them.
        arguments = (q, k[:, :, 260 - n_past :], ids[:, 260 - n_past :], table)
        for seen in (None, mask[..., 260 - n_past :]):
            kernels.attend_fused(*arguments, seen)
    assert len(recorder.kinds) == 2


def test_what_kernels_count_in_is_zero_and_stays_for_graphs(monkeypatch, device):
    monkeypatch.setattr(kernels, "_ended", {})
    small, large, last = (kernels._ended_on(device, n_bag) for n_bag in (4, 5000, 4))
    assert last is large is not small
    assert kernels._ended[device] == [small, large]
    q, k = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 300, 16)
    ids, table = torch.randint(0, 40, (2, 300)), torch.randn(40, 32)
    kernels.attend_fused(*(x.to(device) for x in (q, k, ids, table)), None)
    assert not any(zeros.any() for zeros in (small, large))


@pytest.mark.parametrize("weights", [(1.0, 0.5), (2.0, -1.0, 0.25), (0.5,)])
def test_the_kernel_sums_the_rows_of_a_token(monkeypatch, device, weights):
    monkeypatch.setattr(kernels, "PROGRAMS", 16)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 1, 16, generator=generator)
    k = torch.randn(2, 2, 150, 16, generator=generator)
    ids = torch.randint(0, 40, (2, 150, len(weights)), generator=generator)
    table = torch.randn(40, 32, generator=generator)
    mask = torch.rand(2, 1, 1, 150, generator=generator) < 0.7
    mask[..., -1] = True
    arguments = [x.to(device) for x in (q, k, ids, table, mask)]
    found = kernels.attend_fused(*arguments, weights)
    assert torch.allclose(found, attend_gathered(*arguments, weights), atol=1e-5)


def test_the_kernel_takes_half_precision(device):
    q, k = torch.randn(1, 2, 1, 16).bfloat16(), torch.randn(1, 2, 200, 16).bfloat16()
    ids, table = torch.randint(0, 40, (1, 200)), torch.randn(40, 32).bfloat16()
    arguments = [x.to(device) for x in (q, k, ids, table)]
    found = kernels.attend_fused(*arguments, None)
    exact = attend_gathered(*(x.float() if x.is_floating_point() else x for x in arguments), None)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.parametrize(
    ("window", "weights"),
    [
        (None, None),
        pytest.param(70, None, marks=pytest.mark.slow),
        pytest.param(None, (1.0, -0.5), marks=pytest.mark.slow),
    ],
)
def test_the_kernel_reads_pages(monkeypatch, device, window, weights):
    """Several requests, a padded row, pages in any order; the page table is wider than needed."""
    monkeypatch.setattr(kernels, "PROGRAMS", 60)
    monkeypatch.setattr(kernels, "BLOCK_S", 64)
    generator = torch.Generator().manual_seed(1)
    new, past, n_slot, head_dim = [1, 2, 0, 3], [40, 130, 9, 3], 16, 24
    pages = torch.randn(20, 2, n_slot, head_dim, generator=generator)
    each = () if weights is None else (len(weights),)
    page_ids = torch.randint(0, 40, (20, n_slot, *each), generator=generator).int()
    table = torch.randn(40, 2 * head_dim, generator=generator)
    page_table = torch.randperm(20, generator=generator)[: 4 * 5].view(4, 5).int()
    page_table = torch.cat((page_table, page_table.flip(1)), dim=1)
    q = torch.randn(7, 4, head_dim, generator=generator)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    spans = kernels.token_spans(7, starts.to(device), torch.tensor(past, device=device), window)
    arguments = [x.to(device) for x in (q, pages, page_ids, table)]
    arguments += [spans, page_table.to(device), attention_scale(head_dim), weights]
    found = kernels.attend_pages_fused(*arguments).cpu()
    assert torch.equal(found[-1], torch.zeros(4, head_dim))
    row = 0
    for request, (n_new, n_past) in enumerate(zip(new, past, strict=True)):
        position = torch.arange(n_past)
        page = page_table[request, position // n_slot].long()
        k_KSD = pages[page, :, position % n_slot].transpose(0, 1)
        ids_S = page_ids[page, position % n_slot].long()
        for end in range(n_past - n_new + 1, n_past + 1):
            seen = slice(0 if window is None else max(0, end - 1 - window), end)
            expected = attend_gathered(
                q[row, None, :, None], k_KSD[None, :, seen], ids_S[None, seen], table, None, weights
            )
            assert torch.allclose(found[row], expected[0, :, 0], atol=1e-5)
            row += 1
