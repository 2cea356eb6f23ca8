"""`bov fit` end to end on a tiny recipe: run directory, resume, kill, validate, generate."""

import contextlib
import json
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from forks import Bov
from lightning.pytorch.loggers import TensorBoardLogger
from processes import bov_on_ranks
from runs import (
    assert_close_to,
    assert_same_end,
    die_after,
    final_state,
    fit,
    metrics,
    wait_for,
)

import bov_lightning
from bov_lightning.checkpoint.directory import (
    complete_checkpoints,
)
from bov_lightning.cli import main
from bov_lightning.distributed import strategy
from bov_lightning.distributed.sharding import gathered_once, is_sharded
from bov_lightning.run.directory import RunDirectory


def test_run_directory_tells_everything(tiny_recipe, capsys):
    run = fit(tiny_recipe)
    out, err = capsys.readouterr()
    assert "val_bpb " in out
    assert err.count("step 3/8") == 1
    assert str(run) in out
    assert [path.name for path in complete_checkpoints(run)] == [
        f"step-{step:08d}" for step in (2, 4, 6, 8)
    ]
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["iterations"] == 8
    assert recorded["data"]["source"]
    assert recorded["versions"]["torch"] == metadata.version("torch")
    rows = metrics(run)
    assert {step for step, row in rows.items() if row["val_bpb"]} == {3, 6, 8}
    assert f"val_bpb {float(rows[8]['val_bpb']):.4f}" in out


@pytest.mark.slow
def test_resolved_recipe_trains_the_same_model_again(tiny_run):
    again = fit(tiny_run / "config.yaml", "--run.name", "again")
    assert_same_end(tiny_run, again)


@pytest.mark.slow
def test_two_resumes_equal_none(tiny_recipe, trained, tiny_run):
    whole, parts = trained, tiny_run
    for stop in (4, 6):
        die_after(parts, stop)
        fit(tiny_recipe)
    assert_same_end(whole, parts)
    assert metrics(whole).keys() == metrics(parts).keys()
    for step, row in metrics(whole).items():
        for name in ("train_loss", "val_bpb"):
            assert row[name] == metrics(parts)[step][name], (step, name)
    # Time goes on where an earlier part stopped, so it never falls.
    seconds = [float(row["train_seconds"]) for _, row in sorted(metrics(parts).items())]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


STREAMING = (
    "--data",
    "{class_path: data_modules.StreamingDataModule, init_args: {directory: stream, source: SOURCE, "
    "tokenizer: {vocab_size: 300}, packing: {buffer: 16}, n_lane: 4, n_worker: 1}}",
)


@pytest.mark.slow
def test_two_resumes_of_a_stream_equal_none(tiny_recipe, tiny_settings):
    """Prefetching in a worker process included, on another micro-batch in between."""
    source = json.dumps(tiny_settings["data"]["init_args"]["source"])
    options = (STREAMING[0], STREAMING[1].replace("SOURCE", source))
    parts = fit(tiny_recipe, *options)
    whole = shutil.copytree(parts, "whole")
    for stop in (4, 6):
        die_after(parts, stop)
        fit(tiny_recipe, *options)
    assert_same_end(Path(whole), parts)


@pytest.mark.slow
def test_prepare_makes_what_fit_would_make(tiny_settings, workplace, capsys):
    settings = json.loads(json.dumps(tiny_settings))
    made = {}
    for name in ("by_fit", "by_prepare"):
        settings["data"]["init_args"]["directory"] = name
        (workplace / "tiny.yaml").write_text(yaml.safe_dump(settings))
        command = ["fit", "--model.budget.steps", "1", "--run.name", name]
        if name == "by_prepare":
            for part in ("0/2", "1/2"):
                command = ["prepare", "--shard", part, "--processes", "1"]
                assert main([*command, "--config", "tiny.yaml"]) == 0
        else:
            assert main([*command, "--config", "tiny.yaml"]) == 0
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        made[name] = {path.relative_to(name): path.read_bytes() for path in files}
    assert made["by_fit"] == made["by_prepare"]
    capsys.readouterr()
    assert main(["prepare", "--config", "tiny.yaml"]) == 0
    assert "holds everything already" in capsys.readouterr().out


@pytest.mark.slow
def test_accumulation_may_change_between_resumes(tiny_recipe):
    """The global batches stay the same, so updates differ by the order of additions alone.

    Small learning rates keep the rounding of Muon's bf16 iteration (6% of an update here) from
    growing; other batches would differ by whole updates.
    """
    slowly = ("--model.optimizer.matrix_lr", "1e-4", "--model.optimizer.embedding_lr", "1e-4")
    whole = fit(tiny_recipe, *slowly)
    parts = fit(tiny_recipe, "--run.name", "parts", "--batch.micro", "2", *slowly)
    die_after(parts, 4)
    fit(tiny_recipe, "--run.name", "parts", "--batch.micro", "8", *slowly)
    assert_close_to(whole, parts)


@pytest.mark.distributed
def test_two_processes_equal_one_and_continue_as_one(tiny_recipe, tiny_settings):
    """Real ranks over gloo; then the two-process run goes on from step 4 in one process.

    It is a stream that they share; packed rows are in tests/distributed/test_distributed.py.
    """
    options = ["--model.optimizer.matrix_lr", "1e-4", "--model.optimizer.embedding_lr", "1e-4"]
    source = json.dumps(tiny_settings["data"]["init_args"]["source"])
    options += [STREAMING[0], STREAMING[1].replace("SOURCE", source)]
    one = fit(tiny_recipe, *options, "--run.name", "one")
    command = ("fit", "--config", str(tiny_recipe), *options, "--run.name", "two")
    printed = bov_on_ranks(2, *command)
    two = Path("runs/two")
    assert f"val_bpb {float(metrics(two)[8]['val_bpb']):.4f}" in printed
    assert_close_to(one, two)
    die_after(two, 4)
    fit(tiny_recipe, *options, "--run.name", "two")
    assert_close_to(one, two)
    found, expected = (float(metrics(run)[8]["val_bpb"]) for run in (two, one))
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(tiny_recipe, tiny_run, capsys):
    run = tiny_run
    before = final_state(run)[0]
    capsys.readouterr()
    fit(tiny_recipe)
    captured = capsys.readouterr()
    assert "resuming" in captured.err
    assert "step 8" in captured.err
    assert "val_bpb" in captured.out
    for name, tensor in final_state(run)[0].items():
        assert torch.equal(tensor, before[name])


@pytest.mark.slow
def test_resume_never_moves_the_old_run_aside(tiny_recipe, tiny_run, capsys):
    run = fit(tiny_recipe, "--resume", "never", "--seed", "1")
    assert (Path("runs") / "tiny.old-1" / "config.yaml").is_file()
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 1
    assert "tiny.old-1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_name_that_loggers_know_goes_where_the_run_goes(tiny_recipe, tiny_run, monkeypatch):
    """The variable is what Weights & Biases reads when Lightning's logger first asks for it."""
    seen = []

    class Logger(TensorBoardLogger):
        @property
        def experiment(self):
            seen.append(os.environ["WANDB_RUN_ID"])
            return super().experiment

    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger", Logger)
    settings = yaml.safe_load(tiny_recipe.read_text())
    settings["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "elsewhere"},
    }
    tiny_recipe.write_text(yaml.safe_dump(settings))

    def name(*options: str) -> str:
        del seen[:]
        run = fit(tiny_recipe, *options)
        (found,) = set(seen)
        assert found == RunDirectory(run).logger_id() == (run / "logger-id").read_text().strip()
        assert "WANDB_RUN_ID" not in os.environ
        return found

    first = name()
    tiny_run.rename("runs/moved")
    assert name("--run.name", "moved") == first
    fresh = name("--model.budget.steps", "2")
    afresh = name("--model.budget.steps", "2", "--resume", "never")
    shutil.rmtree("runs/tiny")
    again = name("--model.budget.steps", "2")
    assert len({first, fresh, afresh, again}) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model.config.d_model", "64"), ("--seed", "3"), ("--batch.tokens", "512")],
)
def test_another_recipe_does_not_resume_a_run(tiny_recipe, tiny_run, capsys, option, value):
    assert main(["fit", "--config", str(tiny_recipe), option, value]) == 2
    error = capsys.readouterr().err
    assert option[2:] in error
    assert "run.name" in error


@pytest.mark.slow
def test_keep_last_and_keep_every_prune_the_rest(tiny_recipe):
    run = fit(tiny_recipe, "--checkpoint.keep_last", "1", "--checkpoint.keep_every", "4")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000008",
    ]


@pytest.mark.slow
def test_validate_repeats_the_run_and_every_path_means_the_newest_checkpoint(tiny_run, capsys):
    expected = f"val_bpb {float(metrics(tiny_run)[8]['val_bpb']):.4f}"
    for path in (tiny_run, complete_checkpoints(tiny_run)[-1]):
        assert main(["validate", str(path)]) == 0
        assert capsys.readouterr().out.strip() == expected


def test_a_checkpoint_can_be_copied_away(tiny_run, tmp_path):
    checkpoint = complete_checkpoints(tiny_run)[-1]
    elsewhere = tmp_path / "elsewhere"
    checkpoint.rename(elsewhere)
    model, tokenizer = bov_lightning.load(elsewhere)
    ids = torch.tensor([tokenizer.encode("import json", add_special_tokens=False)])
    logits = model(ids)
    assert logits.shape == (1, ids.shape[1], 300)
    assert logits.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(ids[0]) == "import json"


@pytest.mark.slow
def test_generate_repeats_itself_and_greedy_follows_the_likeliest(tiny_run, capsys):
    command = ["generate", str(tiny_run), "--prompt", "def ", "--max-new-tokens", "6"]
    texts = []
    for options in ([], [], ["--temperature", "0"]):
        assert main([*command, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert all(text.startswith("def ") for text in texts)

    model, tokenizer = bov_lightning.load(tiny_run)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("def ", add_special_tokens=False)]
    for _ in range(6):
        following = int(model(torch.tensor([ids]))[0, -1].argmax())
        if following == tokenizer.bos_token_id:
            break
        ids.append(following)
    assert texts[2].rstrip("\n") == tokenizer.decode(ids[1:]).rstrip("\n")


@pytest.mark.slow
@pytest.mark.gpu
def test_bf16_and_windows_on_the_device_train_as_fp32_does(tiny_recipe, device):
    """FSDP2 on one device; its windows go to FlexAttention on a GPU."""
    windows = ("--model.config.window_pattern", "SSL", "--model.config.d_model", "64")
    plain = fit(tiny_recipe, *windows, "--run.name", "plain")
    accelerator = ("--trainer.accelerator", "gpu" if device.type == "cuda" else "cpu")
    options = (*windows, *accelerator, "--trainer.precision", "bf16-mixed")
    run = fit(tiny_recipe, *options, "--run.name", "half")
    again = fit(tiny_recipe, *options, "--run.name", "again", "--batch.micro", "8")
    assert {tensor.dtype for tensor in final_state(run)[0].values()} == {torch.float32}
    expected = float(metrics(plain)[8]["val_bpb"])
    for path in (run, again):
        assert float(metrics(path)[8]["val_bpb"]) == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_on_one_device_micro_steps_gather_once_and_change_nothing(tiny_recipe, monkeypatch):
    """Against FSDP2's own way, which gathers and reduces in each of the four micro-steps."""
    gathered = []

    @contextlib.contextmanager
    def watched(model, world_size):
        with gathered_once(model, world_size):
            yield
        gathered.append(not any(map(is_sharded, model.parameters())))

    options = ("--trainer.precision", "bf16-mixed", "--batch.micro", "2")
    monkeypatch.setattr(strategy, "gathered_once", watched)
    once = fit(tiny_recipe, *options, "--run.name", "once")
    assert gathered == [True] * 3 * 8
    monkeypatch.setattr(strategy, "gathered_once", lambda *_: contextlib.nullcontext())
    assert_same_end(once, fit(tiny_recipe, *options, "--run.name", "always"))


@pytest.mark.slow
def test_recomputed_activations_change_nothing(tiny_recipe, trained):
    recomputed = fit(tiny_recipe, "--activation_checkpointing", "true", "--run.name", "recomputed")
    assert_same_end(trained, recomputed)


@pytest.mark.slow
def test_interrupting_says_how_to_continue(tiny_recipe):
    """Ctrl-C in the middle of training."""
    longer = ["--model.budget.steps", "5000", "--checkpoint.every_steps", "20"]
    with Bov("fit", "--config", tiny_recipe, *longer) as process:
        wait_for(lambda: complete_checkpoints(Path("runs/tiny")), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted: the same command continues runs/tiny" in err
