"""`bov fit` with value tables in the host's memory, on one device."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_end, die_after, final_state, fit, metrics

import bov_lightning
from bov_lightning.cli import main

HOST = ("--tables_on", "host")
NGRAMS = ("--model.config.value.source", "ngram_bank",
          "--model.config.value.source_args", "{n_row: 500, reach: 2, frequent: 50}")  # fmt: skip
TABLE = "blocks.2.attention.value.source.table"


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on_and_what_it_leaves_is_used(tiny_recipe, capsys):
    run = fit(tiny_recipe, *HOST, *NGRAMS)
    undisturbed = Path(shutil.copytree(run, "runs/undisturbed"))
    die_after(run, 4)
    fit(tiny_recipe, *HOST, *NGRAMS)
    assert_same_end(undisturbed, run)
    # Recomputed blocks look the same rows up.
    fit(tiny_recipe, *HOST, *NGRAMS, "--activation_checkpointing", "true", "--run.name", "again")
    assert_same_end(undisturbed, Path("runs/again"))

    val_bpb = metrics(run)[8]["val_bpb"]
    for command in (
        ("validate", str(run)),
        ("generate", str(run), "--prompt", "import ", "--max-new-tokens", "3"),
        ("export", str(run), "--output", "exported"),
    ):
        capsys.readouterr()
        assert main([*command]) == 0
        if command[0] == "validate":
            assert f"val_bpb {float(val_bpb):.4f}" in capsys.readouterr().out
    model, _ = bov_lightning.load(run)
    assert torch.equal(model.state_dict()[TABLE], final_state(run)[0][TABLE])
    assert "tables_on" not in Path("exported/config.json").read_text()


@pytest.mark.slow
def test_a_run_goes_from_the_device_to_the_host_and_back(tiny_recipe):
    """Its checkpoints are the same, but for the counts of each row's updates."""
    run = fit(tiny_recipe)
    die_after(run, 4)
    fit(tiny_recipe, *HOST)
    counts = final_state(run)[1][f"{TABLE}.row_updates"]
    step = final_state(run)[1][f"{TABLE}.step"]
    # Four steps of all rows, then those of the rows that were read.
    assert step == 8
    assert set(counts.tolist()) == {4, 5, 6, 7, 8}
    die_after(run, 6)
    fit(tiny_recipe)
    state = final_state(run)[1]
    assert f"{TABLE}.row_updates" not in state
    assert state[f"{TABLE}.step"] == 8


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--model.config.value.source", "key"),
         "tables_on is host, but value.source key has no table whose rows can be fetched: use "
         "bank or ngram_bank, or tables_on: device"),
        (("--trainer.gradient_clip_val", "1"),
         "trainer.gradient_clip_val would leave out the tables that tables_on: host keeps from "
         "the trainer: leave it out, or use tables_on: device"),
        (("--tables_on", "disk"), "tables_on is 'disk', but must be device or host"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tiny_recipe, capsys, options, line):
    assert main(["fit", "--config", str(tiny_recipe), *HOST, *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("bov: error: ")
    assert error.endswith(line)
    assert not Path("runs").exists()


def test_a_table_that_muon_would_train_is_refused(tiny_recipe, monkeypatch, capsys):
    monkeypatch.setattr(
        "bov_lightning.model.values.BankOfValues.optimizer_groups", {"table": ("matrix", 1.0)}
    )
    assert main(["plan", "--config", str(tiny_recipe), *HOST]) == 2
    assert capsys.readouterr().err.endswith(
        "tables_on is host, but value.source bank has its table trained by Muon, which takes no "
        "rows alone: put it into the group table in optimizer_groups, or use tables_on: device\n"
    )
