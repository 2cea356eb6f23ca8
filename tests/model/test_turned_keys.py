"""Keys that are kept for values too: attention equals that to rotated keys and plain values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bov_lightning.model.attention import attend, rotary_angles_at, rotate
from bov_lightning.model.layers import rms_norm
from bov_lightning.model.turned_keys import TURN, attend_keys, turn_to_keep

N_ROW, HEAD_DIM = 2, 8


@settings(max_examples=40, deadline=None)
@given(
    n_past=st.sampled_from([1, 2, TURN - 1, TURN, TURN + 1, 3 * TURN + 5]),
    n_new=st.sampled_from([1, 3]),
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    masked=st.booleans(),
    in_order=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_equals_that_to_keys_and_values(
    n_past, n_new, heads, masked, in_order, half, seed
):
    generator = torch.Generator().manual_seed(seed)

    def normed(n_token: int, n_head: int) -> torch.Tensor:
        return rms_norm(torch.randn(N_ROW, n_token, n_head, HEAD_DIM, generator=generator))

    (n_head, n_kv_head), new = heads, min(n_new, n_past)
    # Out of order as in a ring, where some slots hold a later turn of the text.
    positions = torch.arange(n_past)[None]
    if not in_order:
        positions = positions + n_past * (positions % 3)
    q_BTHD, k_BSKD = normed(new, n_head), normed(n_past, n_kv_head)
    seen = torch.rand(N_ROW, 1, new, n_past, generator=generator) < 0.7
    mask = seen | (torch.arange(n_past) == 0) if masked or new > 1 else None
    kept_BKSD = turn_to_keep(k_BSKD, positions).transpose(1, 2).contiguous()
    kept_BKSD = kept_BKSD.bfloat16() if half else kept_BKSD
    rotated = rotate(k_BSKD, *rotary_angles_at(positions, HEAD_DIM))
    expected = attend(*(x.transpose(1, 2) for x in (q_BTHD, rotated, k_BSKD)), mask)
    found = attend_keys(q_BTHD.transpose(1, 2), kept_BKSD, positions, mask, in_order)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=5e-2 if half else 2e-5)


def test_a_key_anywhere_is_its_own_value():
    k_BTKD = rms_norm(torch.randn(1, 1, 1, HEAD_DIM))
    for position in (0, TURN - 1, TURN, 40 * TURN + 3):
        at = torch.tensor([[position]])
        kept = turn_to_keep(k_BTKD, at).transpose(1, 2)
        found = attend_keys(torch.randn(1, 1, 1, HEAD_DIM), kept, at, None, position == 0)
        assert torch.allclose(found[0, 0], k_BTKD[0, 0], atol=1e-5)
