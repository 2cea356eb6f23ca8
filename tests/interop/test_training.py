"""Exports in the hands of those who train, compile and store them."""

import copy
import os
import stat
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from variants import OVERLAYS, make_model, perturb, token_ids

import bov_lightning.hf  # noqa: F401 (registers the classes)
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.errors import UserError
from bov_lightning.interop.hf_export import export
from bov_lightning.interop.hf_import import import_hf
from bov_lightning.interop.hf_model import BoVConfig, BoVForCausalLM
from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    text = "".join(f"def read_{i}(self, path):\n    return path\n" for i in range(9))
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=262))
    save_tokenizer(tokenizer, folder / "tokenizer")
    model = perturb(make_model(OVERLAYS["bov"], n_layer=3, vocab_size=262), smear=0.9)
    write_checkpoint(
        folder / "checkpoint", 7, model.state_dict(), config_yaml(model.config),
        tokenizer=folder / "tokenizer",
    )  # fmt: skip
    export(folder / "checkpoint", folder / "export")
    return folder / "export"


@pytest.mark.slow
def test_the_trainer_takes_the_same_step_however_rows_are_cut(exported, tmp_path):
    """Micro-batches of 8, 2 and 1 rows, with unequal numbers of labels that are not counted."""
    rows = [{"input_ids": x, "labels": x.clone()} for x in token_ids(16, 8, vocab_size=262)]
    for i, row in enumerate(rows):
        row["labels"][: 2 * i] = -100
    moved = []
    for micro, recompute in ((8, False), (2, True), (1, False)):
        model = AutoModelForCausalLM.from_pretrained(exported)
        before = model.model.embedding.weight.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=micro, max_steps=1, max_grad_norm=0,
            gradient_accumulation_steps=8 // micro, learning_rate=1e-2, optim="sgd",
            lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, gradient_checkpointing=recompute, eval_strategy="steps",
            eval_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        moved.append(model.model.embedding.weight.detach() - before)
    assert moved[0].norm() > 1e-4
    for other in moved[1:]:
        assert (other - moved[0]).norm() < 1e-3 * moved[0].norm()


ADAPTED = {"rank": {"target_modules": "all-linear"},
           "head": {"target_modules": ["query", "key"], "modules_to_save": ["head"]}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "packed", *ADAPTED])
def test_fine_tuning_with_trl_and_peft(how, exported, tmp_path):
    """Ten steps lower the loss, which is the model's own, and what is saved comes back."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(exported)
    texts = [f"def read_{i}(self, path):\n" for i in range(8)]
    settings = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=10, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=8, packing=how == "packed", max_length=64,
    )  # fmt: skip
    adapter = None
    if how in ADAPTED:
        adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **ADAPTED[how])
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(exported), args=settings, peft_config=adapter,
        processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}),
    )  # fmt: skip
    first = copy.deepcopy(AutoModelForCausalLM.from_pretrained(exported)).eval()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    if how != "packed":
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        with torch.no_grad():
            assert losses[0] == pytest.approx(first(**batch).loss.item(), abs=1e-3)

    ids = torch.tensor([tokenizer(texts[0]).input_ids])
    saved, merged = str(tmp_path / "saved"), str(tmp_path / "merged")
    trainer.save_model(saved)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        if adapter is None:
            back = [AutoModelForCausalLM.from_pretrained(saved)]
        else:
            base = AutoModelForCausalLM.from_pretrained(exported)
            adapted = peft.PeftModel.from_pretrained(base, saved)
            assert (adapted.eval()(ids).logits - expected).abs().max() < 1e-4
            adapted.merge_and_unload().save_pretrained(merged)
            back = [AutoModelForCausalLM.from_pretrained(merged)]
        assert (back[0].eval()(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_prompts_are_tuned_where_values_need_no_ids():
    peft = pytest.importorskip("peft")
    ids = token_ids(12)
    for name in ("standard", "bov"):
        network = make_model(OVERLAYS[name])
        model = BoVForCausalLM(BoVConfig(**asdict(network.config)))
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        tuned = peft.get_peft_model(model, settings)
        if name == "bov":
            with pytest.raises(UserError, match="inputs_embeds alone is not enough"):
                tuned(ids, labels=ids)
        else:
            tuned(ids, labels=ids).loss.backward()
            (prompt,) = [p for p in tuned.parameters() if p.requires_grad]
            assert prompt.grad.shape == (4, 48)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ways"),
    [("ngram_bank", ("whole", "packed")), ("standard", ("whole",)), ("low_rank_bank", ("packed",))],
)
@torch.no_grad()
def test_a_graph_of_any_length_is_exported(name, ways):
    """Whole, longer than any window, and packed; with torch's own operators alone."""
    network = perturb(make_model(OVERLAYS[name], sequence_len=64, n_layer=4), smear=0.9)
    model = BoVForCausalLM(BoVConfig(**asdict(network.config))).eval()
    model.model.load_state_dict(network.state_dict())

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, positions=None):
            return self.model(ids, position_ids=positions).logits

    rows, time = torch.export.Dim("B", min=2, max=9), torch.export.Dim("T", min=2, max=1000)
    short, long = token_ids(30), token_ids(300, 3)
    packed = [
        torch.cat([torch.arange(n), torch.arange(ids.shape[1] - n)]).repeat(len(ids), 1)
        for n, ids in ((10, short), (190, long))
    ]
    pairs = {"whole": ((short,), (long,)), "packed": ((short, packed[0]), (long, packed[1]))}
    for given, other in (pairs[way] for way in ways):
        shapes = tuple({0: rows, 1: time} for _ in given)
        program = torch.export.export(Logits(), given, dynamic_shapes=shapes)
        assert torch.allclose(program.module()(*other), Logits()(*other), atol=1e-4)
        operators = [str(node.target) for node in program.graph.nodes if "::" in str(node.target)]
        assert not [name for name in operators if name.startswith("bov")]


ANYWHERE = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.arange(1, 13)[None]
for folder in sys.argv[1:]:
    trusted = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    assert type(model).__module__.startswith("transformers_modules")
    with torch.no_grad():
        logits = model(ids).logits
    if folder not in ("my model", "it's"):
        continue
    base = AutoModel.from_pretrained(folder, **trusted).eval()
    model.save_pretrained(folder + " again")
    again = AutoModelForCausalLM.from_pretrained(folder + " again", **trusted).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
        hidden = base(ids).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), logits)
print("all of them")
"""


@pytest.mark.slow
def test_an_export_may_lie_in_any_folder(exported, tmp_path):
    """The modelling file becomes a module that is called after it, for two of them again when
    `transformers` has saved it."""
    names = ["my model", "a.b-c", "1st", "modèle ü", "it's", "class"]
    for name in names:
        (tmp_path / name).symlink_to(exported)
    result = subprocess.run(
        [sys.executable, "-c", ANYWHERE, *names], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "all of them"


@pytest.mark.parametrize(
    "mask", [0o027, *(pytest.param(mask, marks=pytest.mark.slow) for mask in (0o022, 0o077))]
)
def test_files_have_the_permissions_that_the_umask_leaves(mask, tmp_path):
    model = make_model(OVERLAYS["bov"], n_layer=3)
    old = os.umask(mask)
    try:
        write_checkpoint(tmp_path / "a", 1, model.state_dict(), config_yaml(model.config))
        export(tmp_path / "a", tmp_path / "b")
        import_hf(tmp_path / "b", tmp_path / "c")
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".py", ".yaml"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
