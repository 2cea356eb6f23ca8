"""The ids before each token, on steps made by hand."""

import torch

from bov_vllm.past_ids import previous_of_requests, read_previous, write_ids

BLOCK = 4


def a_step():
    """Three requests in the middle of their texts: a chunk, one token, a text's start."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 99, (3, 16), generator=generator)
    spans = [(5, 11), (12, 13), (0, 3)]
    table = torch.tensor([[3, 1, 6, 0], [2, 7, 4, 5], [8, 9, 0, 0]], dtype=torch.int32)
    starts = torch.tensor([0, 6, 7, 10], dtype=torch.int32)
    return texts, spans, table, starts


def slot(table, row, position):
    return int(table[row, position // BLOCK]) * BLOCK + position % BLOCK


def pieces(texts, spans, table):
    positions = torch.tensor([p for first, last in spans for p in range(first, last)])
    new = torch.cat([texts[row, first:last] for row, (first, last) in enumerate(spans)])
    slots = torch.tensor(
        [slot(table, row, p) for row, (a, b) in enumerate(spans) for p in range(a, b)]
    )
    expected = torch.tensor([
        [int(texts[row, p - back]) if p >= back else -1 for back in range(1, 4)]
        for row, (a, b) in enumerate(spans) for p in range(a, b)
    ])  # fmt: skip
    return positions, new, slots, expected


def test_by_slot_and_by_request_they_are_the_tokens_before():
    texts, spans, table, starts = a_step()
    positions, new, slots, expected = pieces(texts, spans, table)
    ids = torch.zeros(10 * BLOCK + 1, dtype=torch.int32)
    for row, (first, _) in enumerate(spans):
        for position in range(first):
            ids[slot(table, row, position)] = texts[row, position]
    # Padding at the end: its slots are negative and its positions left over.
    padding = torch.full((3,), -1)
    write_ids(ids, torch.cat((slots, padding)), torch.cat((new, torch.tensor([50, 51, 52]))))
    for row, (_, last) in enumerate(spans):
        for position in range(last):
            assert ids[slot(table, row, position)] == texts[row, position]
    all_positions = torch.cat((positions, torch.tensor([900, 0, 3])))
    found = read_previous(ids, all_positions, starts, table, BLOCK, 3)
    assert found.shape == (13, 3)
    assert torch.equal(found[:10].long(), expected)

    rows = torch.tensor([2, 0, 1])
    history = torch.full((4, 16), -7, dtype=torch.int32)
    for row, (first, _) in enumerate(spans):
        history[rows[row], :first] = texts[row, :first].to(torch.int32)
    found = previous_of_requests(new.to(torch.int32), positions, starts, rows, history, 3)
    assert torch.equal(found.long(), expected)
