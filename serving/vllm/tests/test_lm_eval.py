"""lm-eval's own backends for vLLM and for transformers on one export."""

import json
import sys

import pytest
from conftest import SHARED
from test_server import run  # noqa: F401 (a fixture)

from bov_lightning.interop.hf_export import export

TASK = """\
task: copa_rows
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def known_vllm(tmp_path, monkeypatch):
    """lm-eval asks for the version of a distribution called vllm, which the CPU build lacks."""
    import vllm

    folder = tmp_path / "site" / f"vllm-{vllm.__version__.partition('+')[0]}+cpu.dist-info"
    folder.mkdir(parents=True)
    version = f"{vllm.__version__.partition('+')[0]}+cpu"
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder.parent)


def test_vllm_scores_as_transformers_does(run, known_vllm, tmp_path):  # noqa: F811
    """Rows of COPA where the shared folder is there, else of our own."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed here")
    from lm_eval.tasks import TaskManager

    rows = SHARED / "eval_bundle" / "eval_data" / "commonsense_reasoning" / "copa.jsonl"
    if not rows.is_file():
        rows = tmp_path / "rows.jsonl"
        choices = ["he ran.", "a stone fell on it."]
        texts = ("The man broke his toe because", "It rained, so", "She read, since")
        rows.write_text(
            "\n".join(json.dumps({"query": text, "choices": choices, "gold": 1}) for text in texts)
        )
    (tmp_path / "copa_rows.yaml").write_text(TASK.format(rows=rows))
    directory = tmp_path / "export"
    export(run, directory)
    scores = {}
    for name, more in {
        "hf": ",trust_remote_code=True,device=cpu",
        "vllm": ",enforce_eager=True,kv_cache_memory_bytes=33554432,max_num_seqs=16",
    }.items():
        found = lm_eval.simple_evaluate(
            model=name,
            model_args=f"pretrained={directory},dtype=float32,add_bos_token=True,max_length=512{more}",
            tasks=["copa_rows"], limit=30, batch_size=4, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
        samples = sorted(found["samples"]["copa_rows"], key=lambda row: row["doc_id"])
        scores[name] = [float(pair[0][0]) for row in samples for pair in row["resps"]]
        scores[name, "acc"] = found["results"]["copa_rows"]["acc,none"]
    assert len(scores["hf"]) >= 6
    assert scores["vllm"] == pytest.approx(scores["hf"], abs=1e-3)
    assert scores["vllm", "acc"] == scores["hf", "acc"]
    assert "vllm" in sys.modules
