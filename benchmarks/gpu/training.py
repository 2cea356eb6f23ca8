"""Stages d and g: a training step at the paper's sizes, by tokens/s, MFU and memory.

python benchmarks/gpu/training.py --output FILE [--only pair reference ...]

What is compared takes turns within this process. A step is `step(4)` or `step(1)` of train.py's
subjects, so many micro-steps and an optimizer step; that of the recipe's batch follows from both.
"""

import argparse
import gc
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import side_by_side
from stage import Results, stage_parser
from train import Llama, Subject

from bov_lightning.distributed.layout import read_layout
from bov_lightning.distributed.sharding import gathered_once, make_mesh, shard
from bov_lightning.model.config import TransformerConfig
from bov_lightning.model.counting import with_standard_values
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.planning.devices import peak_flops
from bov_lightning.planning.memory import plan_memory
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.building import build
from bov_lightning.recipe.overlays import fill_vocab_size, find_recipe, read_yaml
from bov_lightning.recipe.sections import Recipe
from bov_lightning.training.fp8 import use_fp8

SIZES = ("bov-780m", "bov-135m")
SHARE = 0.6
"""Of the device's memory that the plan may fill: another model takes turns with the planned one."""
ROWS = (32, 16, 8, 4)
"""Micro-batches that are planned."""


def read_recipe(name: str, toy: bool) -> Recipe:
    """A packaged recipe, or one of its kind that a CPU trains in no time; nothing is recomputed."""
    recipe = build(Recipe, fill_vocab_size(read_yaml(find_recipe(name))), name)
    recipe = replace(recipe, activation_checkpointing=False)
    if not toy:
        return recipe
    config = replace(recipe.model.config, n_layer=3, n_head=2, n_kv_head=2, d_model=32,
                     vocab_size=256, sequence_len=64)  # fmt: skip
    return replace(recipe, model=replace(recipe.model, config=config),
                   batch=replace(recipe.batch, tokens=2048))  # fmt: skip


def planned(name: str, toy: bool, micro: int, accelerator: str) -> int:
    """Bytes at the peak of a step, by `bov plan`, of ``micro`` rows on one device."""
    recipe = read_recipe(name, toy)
    recipe = replace(recipe, batch=replace(recipe.batch, micro=micro))
    config, batch = recipe.model.config, recipe.batch
    n_micro = accumulation(batch.tokens, batch.micro, config.sequence_len, 1)
    layout = read_layout(recipe.trainer | {"accelerator": accelerator}, 1)
    return plan_memory(recipe, layout, n_micro)["peak"]


@contextmanager
def drawn_on(device: str) -> Iterator[None]:
    """Fills models where they lie: the numbers do not matter, and a CPU draws them for seconds."""

    @torch.no_grad()
    def fill(model: Transformer, *_: Any) -> None:
        for p in model.parameters():
            p.normal_(0, 0.02)

    with patch.object(Transformer, "initialise", fill), torch.device(device):
        yield


class Fitted(Subject):
    """What `bov fit` trains on one device: FSDP2, with bf16 copies of its parameters."""

    def __init__(self, config: TransformerConfig, options: argparse.Namespace, batch: int):
        super().__init__(config, options, batch)
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        shard(self.model, make_mesh(self.device.type, 1, 1), torch.bfloat16)
        batch_tokens = batch * config.sequence_len
        groups = build_groups(self.model, OptimizerConfig(), config, batch_tokens)
        self.optimizer = MuonAdamW(groups)

    def loss(self) -> torch.Tensor:
        """Without autocast: FSDP2 casts."""
        return self.compute_loss()

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        """As Lightning asks `ShardedStrategy` for it."""
        return nullcontext() if is_last else gathered_once(self.model, 1)


class Eight(Subject):
    """The blocks' products in fp8; emulated on a CPU."""

    def __init__(self, config: TransformerConfig, options: argparse.Namespace, batch: int):
        super().__init__(config, options, batch)
        use_fp8(self.model, emulate=self.device.type == "cpu")
        groups = build_groups(self.model, OptimizerConfig(), config, batch * config.sequence_len)
        self.optimizer = MuonAdamW(groups)


@dataclass
class Size:
    """One of the paper's sizes on this device, and what is known of it so far."""

    name: str
    recipe: Recipe
    micro: int
    options: argparse.Namespace
    results: Results
    plans: dict[int, int]

    @property
    def config(self) -> TransformerConfig:
        """Of the BoV model."""
        return self.recipe.model.config

    def keep(self, **found: Any) -> None:
        """Adds to what is known of this size."""
        print(self.name, found, flush=True)
        self.results.setdefault(self.name, {}).update(found)
        self.results.write()

    def make(self, kind: type[Subject], config: TransformerConfig, compiled: bool) -> Subject:
        """A model with its optimizer."""
        options = argparse.Namespace(device=self.options.device, compile=compiled)
        with drawn_on(self.options.device):
            return kind(config, options, self.micro)

    def figures(self, one: float, four: float, flops: float) -> dict[str, Any]:
        """Of a model whose steps of one and of four micro-steps take so many seconds.

        ``flops``: per token, forwards and backwards.
        """
        micro_s = (four - one) / 3
        tokens = self.micro * self.config.sequence_len
        n_micro = accumulation(self.recipe.batch.tokens, self.micro, self.config.sequence_len, 1)
        whole = one + (n_micro - 1) * micro_s
        peak = peak_flops(torch.device(self.options.device))
        return {
            "summary": f"{self.micro} rows; {n_micro * tokens / whole:,.0f}",
            "tokens_per_s": n_micro * tokens / whole,
            "mfu": flops * n_micro * tokens / whole / peak,
            "tokens_per_s_of_4": 4 * tokens / four,
            "mfu_of_4": flops * 4 * tokens / four / peak,
            "micro_step_s": micro_s, "optimizer_step_s": one - micro_s, "step_s": whole,
        }  # fmt: skip


def in_turns(size: Size, subjects: dict[str, Subject], flops: dict[str, float]) -> None:
    """Measures steps of the subjects, and keeps the figures under their names."""
    actions = {
        f"{name}_{n}": lambda subject=subject, n=n: subject.step(n)
        for n in (1, 4) for name, subject in subjects.items()
    }  # fmt: skip
    seconds = side_by_side(actions, size.options.repeats, at_least=0)
    for name in subjects:
        found = size.figures(seconds[f"{name}_1"], seconds[f"{name}_4"], flops[name])
        size.keep(**{name: size.results.get(size.name, {}).get(name, {}) | found})


def peak_gib(size: Size) -> float:
    """Most memory that tensors have taken since the last call, GiB; NaN on a CPU."""
    if size.options.device == "cpu":
        return math.nan
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def pair(size: Size, compiled: bool = True) -> None:
    """BoV and standard values as `bov fit` trains them, and where BoV's step spends its time."""
    kind = "compiled" if compiled else "eager"
    bov = size.make(Fitted, size.config, compiled)
    peak_gib(size)
    bov.step(2)
    peak = peak_gib(size)
    standard = size.make(Fitted, with_standard_values(size.config), compiled)
    names = f"bov_{kind}", f"standard_{kind}"
    size.keep(**{names[0]: {"peak_gib": peak}})
    subjects = dict(zip(names, (bov, standard), strict=True))
    flops = {name: subject.model.flops_per_token() for name, subject in subjects.items()}
    in_turns(size, subjects, flops)
    found = size.results[size.name]
    over = found[names[0]]["step_s"] / found[names[1]]["step_s"]
    size.keep(**{"bov_over_standard" if compiled else "bov_over_standard_eager": over})
    if compiled:
        profile(bov)


def profile(subject: Subject) -> None:
    """Prints a step's operators and kernels, for the log."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = subject.device.type == "cuda"
    with profiler(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as found:
        subject.step(1)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def eager(size: Size) -> None:
    """The same two without compilation."""
    pair(size, compiled=False)


def memory(size: Size) -> None:
    """The peak of what `bov fit` trains, eager, against the plan's."""
    subject = size.make(Fitted, size.config, compiled=False)
    peak_gib(size)
    subject.step(2)
    peak, plan = peak_gib(size), size.plans[size.micro] / 2**30
    size.keep(planned_gib=plan, fit_peak_gib=peak, peak_over_plan=peak / plan)


def fitted(size: Size) -> None:
    """What `bov fit` trains against the bare model with autocast, both compiled."""
    subjects = {
        "bov_beside_fit": size.make(Subject, size.config, True),
        "fit": size.make(Fitted, size.config, True),
    }
    flops = dict.fromkeys(subjects, subjects["bov_beside_fit"].model.flops_per_token())
    in_turns(size, subjects, flops)
    found = size.results[size.name]
    size.keep(fit_over_bare=found["fit"]["step_s"] / found["bov_beside_fit"]["step_s"])


def reference(size: Size) -> None:
    """transformers' Llama of the same shape, with AdamW, compiled as a whole."""
    bov, llama = (size.make(kind, size.config, True) for kind in (Fitted, Llama))
    config = size.config
    n_parameter = sum(p.numel() for p in llama.model.parameters())
    n_parameter -= llama.model.get_input_embeddings().weight.numel()
    every_key = 12 * config.n_layer * config.d_model * config.sequence_len
    flops = {"bov_beside_llama": bov.model.flops_per_token(),
             "llama": 6 * n_parameter + every_key}  # fmt: skip
    in_turns(size, {"bov_beside_llama": bov, "llama": llama}, flops)
    found = size.results[size.name]
    size.keep(bov_over_llama=found["llama"]["step_s"] / found["bov_beside_llama"]["step_s"])


def fp8(size: Size) -> None:
    """fp8 products against bf16 ones; at the first size alone."""
    if size.name != size.options.sizes[0]:
        return
    subjects = {
        "bf16": size.make(Subject, size.config, True), "fp8": size.make(Eight, size.config, True),
    }  # fmt: skip
    flops = dict.fromkeys(subjects, subjects["bf16"].model.flops_per_token())
    in_turns(size, subjects, flops)
    found = size.results[size.name]
    size.keep(fp8_over_bf16=found["bf16"]["step_s"] / found["fp8"]["step_s"])


def products(size: Size) -> None:
    """The ceiling: bare bf16 products of a micro-step's sizes, and what MFU they alone would have.

    Forwards and both gradients of all layers and the head; attention's products are left out.
    """
    config, device = size.config, size.options.device
    d, n_row = config.d_model, size.micro * config.sequence_len
    shapes = {(d, d): 4 * config.n_layer, (d, config.mlp_width): 2 * config.n_layer,
              (d, config.vocab_size): 1}  # fmt: skip
    total_s = total_flops = 0.0
    for (n_in, n_out), times in shapes.items():
        x, w, grad = (
            torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in ((n_row, n_in), (n_out, n_in), (n_row, n_out))
        )
        actions = {"forward": lambda x=x, w=w: x @ w.T, "input": lambda g=grad, w=w: g @ w,
                   "weight": lambda g=grad, x=x: g.T @ x}  # fmt: skip
        seconds = sum(product_seconds(action, device) for action in actions.values())
        total_s += times * seconds
        total_flops += times * 6 * n_row * n_in * n_out
    n = 256 if size.options.toy else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    peak = peak_flops(torch.device(device))
    size.keep(
        square_product_tflops=2 * n**3 / product_seconds(lambda: a @ a, device) / 1e12,
        products_tflops=total_flops / total_s / 1e12, mfu_of_products=total_flops / total_s / peak,
    )  # fmt: skip


def product_seconds(action: Callable[[], object], device: str) -> float:
    """Of one of several that run one after the other."""

    def several() -> None:
        for _ in range(10):
            action()
        if device == "cuda":
            torch.cuda.synchronize()

    return side_by_side({"x": several}, 3, at_least=0)["x"] / 10


def free() -> None:
    """Gives the memory of dropped models back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Size], None]] = {
    "products": products, "pair": pair, "memory": memory, "reference": reference,
    "fitted": fitted, "eager": eager, "fp8": fp8,
}  # fmt: skip
"""The most wanted numbers first."""


def plans_of(options: argparse.Namespace) -> dict[str, dict[int, int]]:
    """`planned` bytes by size and micro-batch, planned side by side."""
    accelerator = "cpu" if options.device == "cpu" else "gpu"
    rows = (4,) if options.toy else ROWS
    asked = [(name, options.toy, micro, accelerator) for name in options.sizes for micro in rows]
    if options.toy:
        found = [planned(*arguments) for arguments in asked]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(asked), os.cpu_count() or 1), context) as pool:
            found = list(pool.map(planned, *zip(*asked, strict=True)))
    plans: dict[str, dict[int, int]] = {name: {} for name in options.sizes}
    for (name, _, micro, _), n_byte in zip(asked, found, strict=True):
        plans[name][micro] = n_byte
    return plans


def main() -> int:
    """Measures what was asked for, size by size; 1 where something failed."""
    parser = stage_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="recipes")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="medians are over so many")
    options = parser.parse_args()
    results = Results(options.output)
    if options.toy:
        options.repeats = 1
        torch.compiler.set_stance("force_eager")
    if options.only == ["fp8"]:
        try:
            import torchao  # noqa: F401
        except ImportError:
            results.keep(left_out="torchao is not installed")
            return 0
    room = math.inf
    if options.device == "cuda":
        room = SHARE * torch.cuda.get_device_properties(0).total_memory
    plans = plans_of(options)
    results.keep(plans_gib={
        name: {micro: round(n / 2**30, 2) for micro, n in found.items()}
        for name, found in plans.items()
    })  # fmt: skip
    failed = []
    for part in options.only or [name for name in PARTS if name != "fp8"]:
        for name in options.sizes:
            fitting = [micro for micro, n in plans[name].items() if n <= room]
            micro = max(fitting, default=min(plans[name]))
            recipe = read_recipe(name, options.toy)
            size = Size(name, recipe, micro, options, results, plans[name])
            try:
                PARTS[part](size)
            except Exception as error:  # no memory, above all: what follows may have enough
                traceback.print_exc()
                failed.append(f"{part} {name}: {' '.join(str(error).split())[:200]}")
                results.keep(failed=failed)
            free()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
