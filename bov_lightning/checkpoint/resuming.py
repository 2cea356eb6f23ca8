"""What a run resumes from: weights, optimizer and random states by name, restored on all ranks."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bov_lightning.checkpoint.directory import (
    OPTIMIZER,
    WEIGHTS,
    damaged_file,
    lost_checkpoints,
    problem,
    step_directories,
    step_name,
)
from bov_lightning.checkpoint.reading import read_tensors, read_training_state, stored_tensors
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.errors import UserError
from bov_lightning.optim.row_adamw import UPDATES

State = dict[str, Tensor]


def weights_of(model: nn.Module) -> State:
    """The parameters and buffers by their name in `Transformer`; DTensors where sharded."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors}


def optimizer_state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's state by parameter name and kind: ``blocks.0.mlp.input.weight.momentum``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{kind}": value
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }


def capture_random(device: torch.device) -> tuple:
    """The states of this process's random generators, as they give them: a copy that costs little.

    `random_state` makes tensors of it.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def random_state(rank: int, device: torch.device, captured: tuple | None = None) -> State:
    """The states of this process's random generators, now or when they were captured."""
    (_, words, _), (_, keys, position, *_), own, cuda = captured or capture_random(device)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "torch": own,
    }
    if cuda is not None:
        state["cuda"] = cuda
    return {f"random.{rank}.{kind}": value for kind, value in state.items()}


def set_random_state(state: State, rank: int, device: torch.device) -> None:
    """Continues where `random_state` was taken."""
    own = {kind: state[f"random.{rank}.{kind}"] for kind in ("python", "numpy", "torch")}
    random.setstate((3, tuple(own["python"].tolist()), None))
    keys, position = own["numpy"][:-1].tolist(), int(own["numpy"][-1])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    torch.set_rng_state(own["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[f"random.{rank}.cuda"], device)


def restore(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks,
    device: torch.device,
) -> tuple[Path | None, dict[str, Any], list[str]]:  # fmt: skip
    """Fills model and optimizer from the newest checkpoint that is complete and readable.

    All ranks call this together. Rank 0 says which checkpoints there are, since file systems of
    clusters do not show all ranks the same at once.

    Returns:
        The checkpoint (None: there is none, and nothing was changed), what else was stored in it,
        and messages about what was taken and what was not.

    Raises:
        UserError: there were checkpoints, but none can be used any more.
    """
    found = ranks.on_first(lambda: [(path, problem(path)) for path in step_directories(run)])
    messages = []
    for path, reason in reversed(found):
        if reason is None:
            try:
                rest = _restore_from(path, model, optimizer, ranks, device)
            except UserError as error:
                reason = str(error)
            else:
                messages.append(f"resuming {run} from step {rest['global_step']} ({path})")
                return path, rest, messages
        messages.append(f"skipped {path}: {reason}")
    lost = ranks.on_first(lambda: lost_checkpoints(run))
    if lost:
        # One that begins with step- was complete once: half written ones begin with a dot.
        names = messages or [f"{path.name} is no name of one" for path in lost]
        raise UserError(
            f"no checkpoint of {run} can be used ({'; '.join(names)}): put one back, as "
            f"checkpoints/{step_name(0).replace('0', 'N')}, or start afresh with --resume never"
        )
    return None, {}, messages


def _restore_from(
    checkpoint: Path, model: nn.Module, optimizer: Any, ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    """Every rank checks and reads its part; what one of them cannot read is an error on all."""

    def check() -> None:
        if damage := damaged_file(checkpoint, ranks.rank, ranks.size):
            raise UserError(damage)

    def read() -> dict[str, Any]:
        options, folder = ranks.dcp_options, checkpoint / OPTIMIZER
        read_tensors(checkpoint / WEIGHTS, weights_of(model), **options)
        optimizer.create_state()
        state = optimizer_state_of(model, optimizer)
        random = random_state(ranks.rank, device)
        # Another number of ranks, or another device, has no use for the stored states.
        stored = set(stored_tensors(folder))
        same_ranks = set(random) <= stored and f"random.{ranks.size}.torch" not in stored
        # Tables that were on the device have no counts of their rows' updates.
        known = {name: t for name, t in state.items() if not name.endswith(f".{UPDATES}")}
        counted = state.keys() - known.keys() <= stored
        known = state if counted else known
        read_tensors(folder, known | random if same_ranks else known, **options)
        if not counted:
            optimizer.count_every_row()
        if same_ranks:
            set_random_state(random, ranks.rank, device)
        return read_training_state(checkpoint)

    ranks.together(check)
    return ranks.together(read)
