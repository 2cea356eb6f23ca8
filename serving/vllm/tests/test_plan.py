"""`bov plan --engine vllm` against what vLLM makes of the same memory."""

import pytest
from engines import BLOCK, engine
from material import make_model, write_export
from test_model import KINDS

from bov_lightning.planning.serving import pages_plan

MEMORY, CONTEXT, BATCHED = 10_000_000, 1000, 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("overlay", "pattern", "n_layer"), [("bov", "L", 6), ("bov", "SSSL", 8), ("standard", "SL", 5)]
)
def test_blocks_and_requests_are_vllms(overlay, pattern, n_layer, kind, tmp_path):
    model = make_model(overlay, pattern, n_layer=n_layer)
    export = write_export(model, tmp_path / "export", bov_values=kind)
    with engine(
        export, kv_cache_memory_bytes=MEMORY, max_model_len=CONTEXT, max_num_batched_tokens=BATCHED
    ) as served:
        config = served.llm.llm_engine.vllm_config
        blocks = served.pages.num_blocks
        requests = config.cache_config.kv_cache_max_concurrency
        (ids,) = served.llm.apply_model(
            lambda found: sum(x.ids.nbytes for x in found.model.pages if x.ids is not None)
        )
        in_flight = config.max_in_flight_tokens
    plan = pages_plan(model.config, kind, MEMORY, CONTEXT, BLOCK, in_flight, 4)
    assert blocks == plan.blocks
    assert requests == pytest.approx(plan.requests)
    assert ids == plan.id_bytes
