"""Every value source behind vLLM, against the network's own forward pass in fp32."""

from importlib.util import find_spec

import engines
import pytest
from engines import BLOCK, NGRAM, TOLERANCE, engine, worst_difference
from material import MORE, PATHS, make_model, make_prompts, write_export

from bov_lightning.model.ngrams import NOTHING
from bov_lightning.planning.serving import pages_plan
from bov_vllm import pages

KINDS = ["stored", *(["keys"] if find_spec("bov_vllm.key_only") else [])]
"""What pages of bank layers hold."""

IN_CI = {("bov", "L", "stored"), ("bov", "SSSL", "keys"), ("low_rank_bank", "SSSL", "stored"),
         ("ngram_bank_frequent", "L", "keys")}  # fmt: skip
DRAFTS_IN_CI = {("first_layer_every", "SSSL", "stored"), ("key", "SSSL", "stored"),
                ("value_embedding_gated", "L", "stored")}  # fmt: skip
COMPILED_IN_CI = {("bov", "SSSL", "keys")}
"""Cases of which each goes another way through the code, once each way."""


def cases(in_ci: set[tuple[str, str, str]]) -> list:
    """(overlay, pattern, kind); key-only pages where there is a bank for them."""
    found = []
    for overlay in (*PATHS, *MORE):
        for pattern in ("L", "SSSL"):
            network = make_model(overlay, pattern)
            has_bank = any(block.attention.value.bank is not None for block in network.blocks)
            for kind in KINDS if has_bank else ["stored"]:
                case = overlay, pattern, kind
                marks = [] if case in in_ci else [pytest.mark.slow]
                found.append(pytest.param(*case, marks=marks))
    return found


@pytest.mark.parametrize(("overlay", "pattern", "kind"), cases(IN_CI))
def test_chunks_prefixes_and_preemptions(overlay, pattern, kind, tmp_path):
    """Steps of 48 tokens and too few blocks, everything twice: nothing of it shows."""
    model = make_model(overlay, pattern)
    export = write_export(model, tmp_path / "export", bov_values=kind)
    # Room for not quite two of the longest texts: as they grow, they push each other out.
    shape = model.config, kind, 10**9, max(map(len, make_prompts())) + 70, BLOCK, 48, 4
    few = round({"L": 1.75, "SSSL": 1.6}[pattern] * pages_plan(*shape).blocks_per_request)
    with engine(
        export, max_num_batched_tokens=48, enable_prefix_caching=True, num_gpu_blocks_override=few
    ) as served:
        for turn in range(2):
            outputs = served.answer(make_prompts(), n_new=70)
            assert worst_difference(model, outputs) < TOLERANCE, f"turn {turn}"
        counts = served.counts()
    assert counts["num_preemptions"] >= 4
    assert counts["prefix_cache_hits"] > 0


def one_step_and_drafts(overlay, pattern, kind, folder, n_new: int, **how) -> None:
    """All prompts in one step, so that some go on from a prefix that others compute in it; then
    n-gram drafts; then everything again, from the cache."""
    model = make_model(overlay, pattern, n_layer=4)
    export = write_export(model, folder / "export", bov_values=kind)
    with engine(
        export, max_num_batched_tokens=8192, enable_prefix_caching=True, speculative_config=NGRAM,
        **how,
    ) as served:  # fmt: skip
        outputs = served.answer(make_prompts(), n_new)
        assert worst_difference(model, outputs) < TOLERANCE
        if pattern == "L":
            assert sum(output.num_cached_tokens for output in outputs) >= 2 * (600 - BLOCK)
        again = served.answer(make_prompts(), n_new)
        assert worst_difference(model, again) < TOLERANCE
        assert sum(output.num_cached_tokens for output in again) > 1000
        counts = served.counts()
    accepted = counts["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counts["spec_decode_num_draft_tokens"]


@pytest.mark.parametrize(
    ("overlay", "pattern", "kind"),
    [case for case in cases(DRAFTS_IN_CI) if case.values in DRAFTS_IN_CI],
)
def test_one_step_and_drafts(overlay, pattern, kind, tmp_path):
    """Eagerly."""
    one_step_and_drafts(overlay, pattern, kind, tmp_path, n_new=48)


@pytest.mark.parametrize(("overlay", "pattern", "kind"), cases(COMPILED_IN_CI))
def test_compiled_in_one_step_with_drafts(overlay, pattern, kind, tmp_path):
    """By torch.compile; what is compared is what the tests above compare an eager engine with."""
    one_step_and_drafts(overlay, pattern, kind, tmp_path, n_new=48, enforce_eager=False)


def test_prompts_log_probabilities(tmp_path):
    model = make_model("bov", "SSSL")
    export = write_export(model, tmp_path / "export")
    with engine(export, max_num_batched_tokens=48) as served:
        outputs = served.answer(make_prompts()[:8], n_new=4, prompt_logprobs=2 * engines.BEST)
    assert all(output.prompt_logprobs is not None for output in outputs)
    assert worst_difference(model, outputs) < TOLERANCE


def no_history(monkeypatch):
    """The first token of a step is taken for a text's first one."""
    read = pages.read_previous

    def forgetful(ids, positions, starts, *where):
        found = read(ids, positions, starts, *where)
        found[starts[:-1].long()] = 0
        return found

    monkeypatch.setattr(pages, "read_previous", forgetful)


def off_by_one(monkeypatch):
    """A window is counted as here, not as vLLM does."""
    monkeypatch.setattr(pages, "sliding_window", lambda window: window)


def late(monkeypatch):
    """Ids are written after they were read."""
    read, write, due = pages.read_previous, pages.write_ids, []

    def read_then_write(*given):
        found = read(*given)
        write(*due.pop())
        return found

    monkeypatch.setattr(pages, "write_ids", lambda *given: due.append(given))
    monkeypatch.setattr(pages, "read_previous", read_then_write)


def nearest_alone(monkeypatch):
    """Of the ids before a token, those beyond the nearest are taken for none."""
    read = pages.read_previous

    def short(*given):
        found = read(*given)
        found[:, 1:] = NOTHING
        return found

    monkeypatch.setattr(pages, "read_previous", short)


@pytest.mark.parametrize(
    ("mistake", "overlay"),
    [(no_history, "bov"), (off_by_one, "bov"), (late, "bov"),
     (nearest_alone, "ngram_bank_frequent")],
)  # fmt: skip
def test_a_mistake_is_found(mistake, overlay, monkeypatch, tmp_path):
    """What the tests above would say if it were made."""
    model = make_model(overlay, "SSSL")
    export = write_export(model, tmp_path / "export", bov_values="stored")
    mistake(monkeypatch)
    with engine(export, max_num_batched_tokens=96) as served:
        outputs = served.answer(make_prompts()[1:9], n_new=4)
    assert worst_difference(model, outputs) > 10 * TOLERANCE


def test_bf16_differs_no_more_than_our_own_cache(tmp_path):
    """Of the network's own whole forward pass in bf16."""
    import torch

    model = make_model("bov", "SSSL").to(torch.bfloat16)
    export = write_export(model, tmp_path / "export")
    with engine(export, dtype="bfloat16", max_num_batched_tokens=96) as served:
        outputs = served.answer(make_prompts()[:8], n_new=1, prompt_logprobs=2 * engines.BEST)
    own = theirs = 0.0
    with torch.inference_mode():
        for output in outputs:
            ids = torch.tensor([output.prompt_token_ids])
            whole = model(ids)[0].float().log_softmax(-1)
            cached = model(ids, cache=model.new_cache(1, 1280))[0].float().log_softmax(-1)
            own = max(own, float((whole - cached).abs().max()))
            for i, served_here in enumerate(output.prompt_logprobs):
                for token, found in (served_here or {}).items():
                    theirs = max(theirs, abs(found.logprob - float(whole[i - 1, token])))
    assert theirs < max(3 * own, 0.1)
