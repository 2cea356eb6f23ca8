"""What is not served is said in one line, and other models are served as before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from engines import engine
from material import make_model, write_export

import bov_vllm


def refused(export: Path, **how) -> str:
    """The line of ours in what vLLM says."""
    with pytest.raises((ValueError, RuntimeError)) as caught, engine(export, **how):
        pass
    return str(caught.value)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(make_model("bov", n_layer=2), tmp_path_factory.mktemp("small") / "export")


def edited(export: Path, target: Path, **changes) -> Path:
    """A copy whose config.json says something else."""
    target.mkdir()
    for file in export.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((export / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_documents_are_refused(export, tmp_path):
    assert "document_start is 3" in refused(edited(export, tmp_path / "x", document_start=3))


def test_more_than_one_device_is_refused(export):
    line = refused(export, tensor_parallel_size=2)
    assert "tensor_parallel_size is 2: bov-vllm serves on one device" in line


def test_connectors_are_refused(export):
    given = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    assert "kv_transfer_config" in refused(export, kv_transfer_config=given)


def test_another_vllm_is_refused(export, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    assert "bov-vllm serves with vLLM 0.32, not 0.33.1" in refused(export)


def test_a_source_that_nobody_trusts_is_refused(export, tmp_path):
    value = {"source": "somebodys_module.Bank", "layers": "last_third"}
    line = refused(edited(export, tmp_path / "x", value=value))
    assert "BOV_TRUSTED_MODULES=somebodys_module" in line


def test_heads_without_kernel_are_refused(tmp_path):
    network = make_model("bov", n_layer=2, d_model=48, n_head=2)
    assert "heads of 24 channels" in refused(write_export(network, tmp_path / "export"))


def test_an_unknown_kind_of_pages_is_refused(export):
    assert "bov_values is 'values'" in refused(export, hf_overrides={"bov_values": "values"})


def test_missing_weights_are_named(export, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = edited(export, tmp_path / "x")
    weights = load_file(broken / "model.safetensors")
    del weights["model.blocks.1.attention.key.weight"]
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.blocks.1.attention.key.weight" in refused(broken)


def test_a_longer_context_is_refused(export):
    assert "max_model_len" in refused(export, max_model_len=5000)


def test_register_never_raises(monkeypatch):
    """Whatever is missing; twice in one process, as vLLM may call it."""
    bov_vllm.register()
    bov_vllm.register()
    for module in ("bov_lightning.interop.hf_model", "vllm.model_executor.models.config"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            bov_vllm.register()


def test_a_llama_is_served_as_before(tmp_path):
    """With the plugin in place, and in an environment where the plugin finds nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(shape).eval()
    llama.save_pretrained(tmp_path / "llama")
    prompt = [5, 17, 3, 80]
    with engine(tmp_path / "llama", max_num_batched_tokens=128, max_num_seqs=4) as served:
        (output,) = served.answer([prompt], n_new=8)
    expected = llama.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert list(output.outputs[0].token_ids) == expected[0, 4:].tolist()


@pytest.mark.slow
def test_the_plugin_needs_no_trainer():
    """Serving imports none of what only training, evaluation and reports need."""
    code = (
        "import sys, bov_vllm.model; bov_vllm.register();"
        "print([n for n in ('lightning', 'lm_eval', 'datasets', 'jsonargparse', 'matplotlib')"
        " if n in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"
