"""Every block runs compiled, in training and in validation, however many kinds there are."""

import pytest
from variants import OVERLAYS, make_model, token_ids


@pytest.mark.slow
def test_no_kind_of_block_is_left_uncompiled():
    """The tracer of the compiler, whose graphs PyTorch runs here as they are."""
    import torch

    torch._dynamo.reset()
    graphs, calls = [], []

    def count(graph: torch.fx.GraphModule, _) -> object:
        graphs.append(graph)

        def run(*arguments):
            calls.append(graph)
            return graph(*arguments)

        return run

    model = make_model(OVERLAYS["bov_every_second"], n_layer=8, sequence_len=200)
    ids = token_ids(201)
    # Undone by torch: what pytest's monkeypatch puts back would be hidden from then on.
    with torch._dynamo.config.patch(recompile_limit=8):
        model.compile_blocks(backend=count)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                model(ids[:, :-1], ids[:, 1:], "mean" if mode is torch.enable_grad else "none")
    assert len(graphs) > 8
    assert len(calls) == 3 * len(model.blocks)
    torch._dynamo.reset()
