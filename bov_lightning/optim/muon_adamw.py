"""One optimizer: Muon with variance reduction for matrices, AdamW for everything else.

The rule is that of the paper's training code: Nesterov momentum, orthogonalisation by Polar Express
(arXiv 2505.16932) in bf16, NorMuon's variance reduction (arXiv 2510.05491) and cautious weight
decay (arXiv 2510.12402).

Parameters may be plain tensors or DTensors that FSDP2 sharded over their rows (and, with HSDP,
replicated beside that). State is kept per parameter and sharded like it, so that distributed
checkpoints can reshard it. Matrices of one shape are updated together: for DTensors one all-to-all
brings whole matrices to single ranks, which orthogonalise their part, and another brings them back.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from bov_lightning.distributed.host_tables import TablesOnHost
from bov_lightning.distributed.sharding import is_sharded, local_part
from bov_lightning.optim.adamw import step_adamw
from bov_lightning.optim.row_adamw import UPDATES, RowAdamW

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients (a, b, c) of the five iterations, for a safety factor of 1.01."""


def polar_express(stack: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack (n, rows, cols), computed in ``dtype``."""
    x = stack.to(dtype)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.shape[-2] > x.shape[-1]
    multiply = _multiply if _multiplies_slowly(x) else torch.matmul
    for a, b, c in POLAR_EXPRESS:
        gram = multiply(x.mT, x) if tall else multiply(x, x.mT)
        polynomial = b * gram + c * multiply(gram, gram)
        x = a * x + (multiply(x, polynomial) if tall else multiply(polynomial, x))
    return x


def _multiplies_slowly(x: Tensor) -> bool:
    """Whether this processor lacks bf16 products, which then take 25 times as long as fp32's."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The same product: bf16's are summed up in fp32, and rounded once."""
    return (a.float() @ b.float()).to(a.dtype)


def _shard_mesh(tensor: "DTensor") -> "DeviceMesh":
    """The ranks that together hold one copy; with HSDP the last of the mesh's two dimensions."""
    mesh = tensor.device_mesh
    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer.

    A step whose gradients hold NaN or infinity changes nothing, on any rank.

    Attributes:
        gradient_norm: Euclidean norm of all gradients at the last step, over all ranks.
        n_skipped: steps that changed nothing so far.
        n_skipped_in_row: how many of them were the last ones.

    Args:
        groups: parameter groups with the key ``kind``:
            ``muon`` with ``lr``, ``momentum``, ``beta2``, ``weight_decay``, and ``dtype``, which
            the orthogonalisation is computed and sent in: bf16 if not given (2-D parameters only);
            ``adamw`` with ``lr``, ``betas``, ``eps``, ``weight_decay`` (decoupled).
        on_host: value tables in the host's memory, which are parameters of an ``adamw`` group and
            trained by row (`RowAdamW`).
    """

    def __init__(self, groups: Iterable[dict], on_host: TablesOnHost | None = None):
        defaults = {"lr": 0.0, "weight_decay": 0.0}
        super().__init__(list(groups), defaults)
        for group in self.param_groups:
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"optimizer group kind {group['kind']!r}: use muon or adamw")
            if group["kind"] == "muon" and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon updates matrices only: give other parameters to adamw")
            if group["kind"] == "muon":
                group.setdefault("dtype", torch.bfloat16)
        self.rows = None if on_host is None else RowAdamW(on_host)
        self.gradient_norm = math.nan
        self.n_skipped = self.n_skipped_in_row = 0

    def create_state(self) -> None:
        """Makes the state of all parameters that have none, as zeros: what a checkpoint fills."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    continue
                if self.rows is not None and self.rows.holds(p):
                    self.state[p].update(self.rows.new_state(p))
                elif group["kind"] == "adamw":
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
                else:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["second_moment"] = _averaged_zeros(p, _average_dim(p))

    @torch.no_grad()
    def count_every_row(self) -> None:
        """Takes every row of a table in the host's memory for updated in every step so far: what is
        true of a checkpoint whose tables were on the device."""
        for state in self.state.values():
            if UPDATES in state:
                local_part(state[UPDATES]).fill_(state["step"])

    @torch.no_grad()
    def step(self, closure=None):
        """Updates all parameters that have a gradient; of tables in the host's memory the rows."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradient_norm = self._gradient_norm()
        if not math.isfinite(self.gradient_norm):
            self.n_skipped += 1
            self.n_skipped_in_row += 1
            return loss
        self.n_skipped_in_row = 0
        self.create_state()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw":
                if parameters:
                    self._adamw(parameters, group)
                continue
            by_shape = defaultdict(list)
            for p in parameters:
                by_shape[p.shape, p.device, p.dtype].append(p)
            for matrices in by_shape.values():
                self._muon(matrices, group)
        if self.rows is not None:
            self.rows.step(self.state, self.param_groups)
        return loss

    def _gradient_norm(self) -> float:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        grads = [grad for grad in grads if grad is not None]
        local = [local_part(grad) for grad in grads]
        # A rank may hold no rows of a small parameter.
        norms = torch._foreach_norm([grad for grad in local if grad.numel()])
        square = torch.stack(norms).square().sum()
        sharded = next((grad for grad in grads if is_sharded(grad)), None)
        if sharded is not None:
            _sum_over_shards(square, sharded)
        on_host = 0.0 if self.rows is None else self.rows.gather()
        return math.sqrt(square.item() + on_host)

    def _adamw(self, parameters: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in parameters]
        # One pass over memory; tables are large, and their step is nothing else.
        step_adamw(
            [local_part(p) for p in parameters],
            [local_part(p.grad) for p in parameters],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            group,
        )

    def _muon(self, matrices: list[Tensor], group: dict) -> None:
        rows, cols = matrices[0].shape
        average_dim = _average_dim(matrices[0])
        values = [local_part(p) for p in matrices]
        grads = [local_part(p.grad) for p in matrices]
        momenta = [local_part(self.state[p]["momentum"]) for p in matrices]
        second_moments = [local_part(self.state[p]["second_moment"]) for p in matrices]

        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        x = self._orthogonalise(torch.stack(updates), matrices[0], group["dtype"]).float()

        n_average = cols if average_dim == -1 else rows
        v = torch.linalg.vector_norm(x, dim=average_dim, keepdim=True).square_()
        if average_dim == -2:
            v = _sum_over_shards(v, matrices[0])
        v /= n_average
        s = torch.stack(second_moments).lerp_(v, 1 - group["beta2"])
        torch._foreach_copy_(second_moments, list(s))
        r = s.clamp(min=1e-10).rsqrt()
        squares = n_average * torch.stack((v, v * r * r)).flatten(2).sum(-1)
        if average_dim == -1:
            squares = _sum_over_shards(squares, matrices[0])
        before, after = squares.sqrt()
        x *= r * (before / after.clamp(min=1e-10))[:, None, None]

        lr = group["lr"] * max(1.0, rows / cols) ** 0.5
        if group["weight_decay"]:
            decay = torch.stack(values)
            decay *= x * decay >= 0
            x.add_(decay, alpha=group["weight_decay"])
        torch._foreach_add_(values, list(x), alpha=-lr)

    def _orthogonalise(self, stack: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Polar Express of a stack of (local rows of) matrices that are laid out as ``like``."""
        if not is_sharded(like):
            return polar_express(stack, dtype)
        from torch.distributed.tensor import DTensor, Shard

        mesh, placement = _shard_mesh(like), like.placements[-1]
        if not (isinstance(placement, Shard) and placement.dim == 0):
            raise ValueError(f"Muon expects matrices sharded over their rows, got {placement}")
        shape = torch.Size((len(stack), *like.shape))
        stride = (like.shape[0] * like.shape[1], like.shape[1], 1)
        by_rows = DTensor.from_local(
            stack.to(dtype), mesh, [Shard(1)], run_check=False, shape=shape, stride=stride
        )
        by_matrix = by_rows.redistribute(placements=[Shard(0)]).to_local()
        whole = polar_express(by_matrix, dtype) if len(by_matrix) else by_matrix
        result = DTensor.from_local(
            whole.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        return result.redistribute(placements=[Shard(1)]).to_local()


def _average_dim(matrix: Tensor) -> int:
    """Variance reduction averages over the longer side: one number per row, or per column."""
    return -1 if matrix.shape[0] >= matrix.shape[1] else -2


def _averaged_zeros(matrix: Tensor, dim: int) -> Tensor:
    """Zeros of the matrix's shape with ``dim`` averaged away: kept where the other dimension is."""
    shape = list(matrix.shape)
    shape[dim] = 1
    if not is_sharded(matrix):
        return matrix.new_zeros(shape)
    from torch.distributed.tensor import Replicate, zeros

    mesh = matrix.device_mesh
    placements = matrix.placements if dim == -1 else [Replicate()] * mesh.ndim
    return zeros(shape, dtype=matrix.dtype, device_mesh=mesh, placements=placements)


def _sum_over_shards(local: Tensor, matrix: Tensor) -> Tensor:
    """The sum over the ranks that hold the matrix's rows; in place."""
    if is_sharded(matrix):
        dist.all_reduce(local, group=_shard_mesh(matrix).get_group())
    return local
