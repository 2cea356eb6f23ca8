"""Which processes a run consists of, and the job that `bov submit` writes."""

import subprocess
from pathlib import Path

import pytest

from bov_lightning.cli import main
from bov_lightning.distributed.processes import SrunEnvironment, processes, restarted
from bov_lightning.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after those of whatever started the tests are gone."""
    for name in [*SRUN, "TORCHELASTIC_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_tasks_of_srun_are_the_devices_even_in_a_job_called_bash(environment):
    environment(SRUN)
    found, devices, n_node = processes(1, 1)
    assert isinstance(found, SrunEnvironment)
    assert (devices, n_node) == (8, 2)
    assert (found.world_size(), found.global_rank()) == (16, 3)


def test_processes_of_torchrun_are_the_devices(environment):
    environment({"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"})
    assert processes(1, 1)[1:] == (4, 2)
    assert processes(4, 2)[1:] == (4, 2)


def test_one_process_starts_the_others_itself(environment):
    assert processes(3, 1)[1:] == (3, 1)
    environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"})
    assert processes(3, 1)[1:] == (3, 1)


@pytest.mark.parametrize(
    ("variables", "devices", "words"),
    [
        ({}, 4, ["srun", "8 tasks", "2 nodes", "trainer.devices is 4"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "9,7"}, 1, ["9,7", "--ntasks-per-node"]),
        # The batch script itself, where SLURM sets no step.
        ({"SLURM_STEP_ID": ""}, 1, ["16 tasks", "put srun in front"]),
        # A shell in an allocation is a step with a number of its own.
        ({"SLURM_STEP_ID": str(2**32 - 6)}, 1, ["put srun in front"]),
    ],
)
def test_tasks_that_do_not_fit_are_refused(environment, variables, devices, words):
    environment({**SRUN, **variables})
    with pytest.raises(UserError) as refused:
        processes(devices, 1)
    for word in words:
        assert word in str(refused.value)


def test_a_requeued_job_knows_it(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert restarted()


def submit(recipe: Path, *options: str) -> int:
    return main(["submit", "--config", str(recipe), *options])


def test_dry_run_prints_the_job_and_writes_nothing(tiny_recipe, workplace, capsys):
    options = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--partition", "gpu",
               "--account", "me", "--sbatch=--constraint=h100", "--setup", "module load cuda",
               "--batch.micro", "1", "--dry-run"]  # fmt: skip
    assert submit(tiny_recipe, *options) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00",
                 "--signal=SIGUSR1@300", "--requeue", "--partition=gpu", "--account=me",
                 "--constraint=h100"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert not (workplace / "runs").exists()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "3"], ["not divisible", "3 devices"]),
        (["--nodes", "0"], ["--nodes is 0"]),
        (["--trainer.devices", "2", "--gpus-per-node", "4"], ["trainer.devices is 2", "has 4"]),
    ],
)
def test_jobs_that_would_fail_are_not_submitted(tiny_recipe, capsys, options, words):
    assert submit(tiny_recipe, *options) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_watcher_is_a_job_of_its_own(tiny_recipe, workplace, capsys):
    tasks = ("--evaluation.tasks", "[core_copa, heldout]", "--evaluation.max_per_task", "7")
    assert submit(tiny_recipe, "--evaluate", *tasks, "--dry-run") == 0
    script = capsys.readouterr().out
    watch = f"evaluate {workplace}/runs/tiny --watch --max-per-task=7 --tasks core_copa heldout"
    assert watch in script
    assert "eval/step-*/results*.json" in script
    assert submit(tiny_recipe, "--evaluate", "--dry-run") == 2
    assert "evaluation.tasks is empty" in capsys.readouterr().err


def test_without_sbatch_nothing_is_written(tiny_recipe, workplace, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(workplace))
    assert submit(tiny_recipe) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("codes", "progress", "requeued"),
    [
        ([0], True, False), ([2], True, False), ([143], True, False), ([75], True, True),
        ([138], False, True), ([75] * 3, False, True), ([75] * 4, False, False),
        ([1], True, True), ([137], True, True), ([137], False, False),
    ],
)  # fmt: skip
def test_script_requeues_by_exit_code_and_progress(
    tiny_recipe, workplace, capsys, codes, progress, requeued
):
    """The script itself under bash; srun and scontrol are replaced by what they do to it."""
    assert submit(tiny_recipe, "--dry-run") == 0
    script = capsys.readouterr().out
    programs = workplace / "bin"
    programs.mkdir()
    run = workplace / "runs/tiny"
    run.mkdir(parents=True)
    for attempt, code in enumerate(codes, start=1):
        save = run / f"checkpoints/step-{attempt:08d}"
        done = f"mkdir -p {save}; touch {save}/checkpoint.json;" if progress else ""
        for name, body in {
            "srun": f"{done} exit {code}",
            "scontrol": 'echo "$1" >> requeued',
            "sleep": "exit 0",
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        (workplace / "requeued").unlink(missing_ok=True)
        result = subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, cwd=workplace,
            env={"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        )  # fmt: skip
        assert result.returncode == code
    asked = workplace / "requeued"
    assert ("requeue" in asked.read_text().split() if asked.exists() else False) == requeued
