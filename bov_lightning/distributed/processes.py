"""Which processes make up a run: those of srun, of torchrun, or those that Lightning starts."""

import os
import re
from typing import Any

from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from bov_lightning.errors import UserError


class SrunEnvironment(SLURMEnvironment):
    """Tasks that srun started, whatever the job is called.

    Lightning's own class takes a job named ``bash`` for no job, needs ``--ntasks-per-node``, and
    requeues jobs from inside a signal handler.
    """

    def __init__(self):
        self.auto_requeue = False
        self.requeue_signal = None

    def world_size(self) -> int:
        """Tasks of this step."""
        return int(os.environ["SLURM_STEP_NUM_TASKS"])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing: `processes` has taken both from SLURM."""


def processes(devices: Any, n_node: Any) -> tuple[ClusterEnvironment, Any, Any]:
    """The environment, and trainer.devices and trainer.num_nodes as it has them.

    Args:
        devices: trainer.devices of the recipe.
        n_node: trainer.num_nodes of the recipe.

    Raises:
        UserError: tasks and devices do not match, or several tasks were not started by srun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // per_node
        _check("torchrun", per_node, nodes, devices, n_node)
        return TorchElasticEnvironment(), per_node, nodes
    if started_by_srun():
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        if tasks == 1:
            return LightningEnvironment(), devices, n_node
        layout = os.environ["SLURM_STEP_TASKS_PER_NODE"]
        if not re.fullmatch(r"\d+(\(x\d+\))?", layout):
            raise UserError(
                f"srun started unequally many tasks per node ({layout}): use --ntasks-per-node"
            )
        _check("srun", tasks // nodes, nodes, devices, n_node)
        return SrunEnvironment(), tasks // nodes, nodes
    if (tasks := int(os.environ.get("SLURM_NTASKS", 1))) > 1:
        raise UserError(
            f"this SLURM job has {tasks} tasks, but bov was not started by srun and would wait for "
            "the others for ever: put srun in front of the command"
        )
    return LightningEnvironment(), devices, n_node


def started_by_srun() -> bool:
    """Whether this process is a task of srun, not the batch script or a shell on the node."""
    step = os.environ.get("SLURM_STEP_ID", "")
    # Special steps (the batch script, an allocation's shell) have numbers from 2^32 - 16 up.
    return step.isdigit() and int(step) < 2**32 - 16 and "SLURM_STEP_NUM_TASKS" in os.environ


def restarted() -> bool:
    """Whether SLURM or torchrun started this job before."""
    counts = (os.environ.get(f"{who}_RESTART_COUNT") for who in ("SLURM", "TORCHELASTIC"))
    return any(count not in (None, "", "0") for count in counts)


def _check(launcher: str, per_node: int, nodes: int, devices: Any, n_node: Any) -> None:
    """Recipes say 1 device where they leave it open."""
    asked = {"trainer.devices": (devices, per_node), "trainer.num_nodes": (n_node, nodes)}
    for key, (configured, found) in asked.items():
        if isinstance(configured, int) and configured not in (1, found):
            raise UserError(
                f"{launcher} started {per_node} tasks on each of {nodes} nodes, but {key} is "
                f"{configured}: start one task per device, or set {key} to {found}"
            )
