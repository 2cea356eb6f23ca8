"""`bov plan --engine vllm` against what vLLM makes of the same memory."""

import pytest
from engines import BLOCK, engine
from material import make_model, write_export
from test_model import KINDS

from bov_lightning.planning.serving import pages_plan

MEMORY, CONTEXT, BATCHED = 10_000_000, 1000, 96


def bytes_of_ids(served) -> int:
    """The smear's, and those of pages of keys alone, once for each block table of theirs."""
    (smear,) = served.llm.apply_model(
        lambda found: sum(page.ids.nbytes for page in found.model.pages if page.ids is not None)
    )
    runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    builders = [group.get_metadata_builder() for groups in runner.attn_groups for group in groups]
    return smear + sum(b.page_ids.ids.nbytes for b in builders if hasattr(b, "page_ids"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("overlay", "pattern", "n_layer"),
    [
        ("bov", "SSSL", 8),
        pytest.param("bov", "L", 6, marks=pytest.mark.slow),
        pytest.param("ngram_bank_frequent", "L", 6, marks=pytest.mark.slow),
        pytest.param("standard", "SL", 5, marks=pytest.mark.slow),
    ],
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
        served.answer([[1, 2, 3]], n_new=2)
        ids = bytes_of_ids(served)
        in_flight = config.max_in_flight_tokens
    plan = pages_plan(model.config, kind, MEMORY, CONTEXT, BLOCK, in_flight, 4)
    assert blocks == plan.blocks
    assert requests == pytest.approx(plan.requests)
    assert ids == plan.id_bytes
