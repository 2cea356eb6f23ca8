"""Training: a step against a Llama's and against standard values, `bov fit` against a bare loop.

    python benchmarks/train.py [--device cuda] [--compile] [--repeats 5] [--only NAME ...]
    python benchmarks/train.py --profile    # where a step spends its time, at three sizes

Everything that is compared takes turns within this one process; medians. What is not a time is
measured in processes of its own.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import harness
from harness import report, side_by_side

from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.counting import with_standard_values
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.planning.devices import peak_flops

BOV = ValueConfig("bank", "last_third", "learned")
QUICKSTART = TransformerConfig(6, 2, 2, 128, 4096, 256, "L", value=BOV)
SMALL = TransformerConfig(6, 6, 6, 384, 8192, 512, "SSSL", value=BOV)
TWELVE = TransformerConfig(12, 6, 6, 384, 8192, 512, "SSSL", value=BOV)
SIZE_135M = TransformerConfig(12, 6, 6, 768, 32768, 2048, "SSSL", value=BOV)
SIZE_780M = TransformerConfig(24, 12, 12, 1536, 32768, 2048, "SSSL", value=BOV)
LOSS_MEMORY = replace(SMALL, vocab_size=32768, sequence_len=2048)
BATCH = 4
"""Rows of a micro-step."""


class Subject:
    """A model with its optimizer and one batch, on a device."""

    def __init__(self, config: TransformerConfig, options: argparse.Namespace, batch: int = BATCH):
        self.config, self.device = config, torch.device(options.device)
        self.model = Transformer(config).to(self.device)
        if options.compile:
            self.model.compile_blocks()
        batch_tokens = batch * config.sequence_len
        groups = build_groups(self.model, OptimizerConfig(), config, batch_tokens)
        self.optimizer: torch.optim.Optimizer = MuonAdamW(groups)
        shape = (batch, config.sequence_len + 1)
        self.rows = torch.randint(0, config.vocab_size, shape).to(self.device)

    def loss(self) -> torch.Tensor:
        """In nats per token; bf16 products on a GPU."""
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            return self.compute_loss()

    def compute_loss(self) -> torch.Tensor:
        """What `loss` wraps."""
        return self.model(self.rows[:, :-1], self.rows[:, 1:])

    def forward_backward(self) -> None:
        """One micro-step whose gradients are dropped."""
        self.loss().backward()
        self.optimizer.zero_grad()
        self._wait()

    def step(self, n_micro: int) -> None:
        """A whole optimizer step of ``n_micro`` micro-steps."""
        for i in range(n_micro):
            with self.micro_step(i == n_micro - 1):
                self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        """What goes around a micro-step of `step`."""
        return nullcontext()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Llama(Subject):
    """transformers' Llama of the same width, layers and heads, with AdamW."""

    def __init__(self, config: TransformerConfig, options: argparse.Namespace, batch: int = BATCH):
        super().__init__(config, argparse.Namespace(**{**vars(options), "compile": False}), batch)
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model,
            intermediate_size=8 * config.d_model // 3, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, max_position_embeddings=config.sequence_len,
            bos_token_id=None, eos_token_id=None, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(shape).to(self.device)
        self.forward = torch.compile(self.model) if options.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def compute_loss(self) -> torch.Tensor:
        """The loss that the model computes itself."""
        ids, targets = self.rows[:, :-1], self.rows[:, 1:].contiguous()
        return self.forward(input_ids=ids, labels=ids, shift_labels=targets).loss


def against_llama(options: argparse.Namespace) -> tuple[dict, dict]:
    """Forward and backward, and a step of four micro-steps."""
    ours, llama = Subject(SMALL, options), Llama(SMALL, options)
    kind = "_compiled" if options.compile else ""
    actions: dict[str, Callable[[], object]] = {
        "ours": ours.forward_backward, "llama": llama.forward_backward,
        "ours_step": lambda: ours.step(4), "llama_step": lambda: llama.step(4),
    }  # fmt: skip
    seconds = side_by_side(actions, options.repeats)
    return seconds, {
        f"forward_backward_vs_llama{kind}": seconds["llama"] / seconds["ours"],
        f"step_vs_llama{kind}": seconds["llama_step"] / seconds["ours_step"],
    }


def against_standard(options: argparse.Namespace) -> tuple[dict, dict]:
    """BoV's time over that of standard values: a micro-step, and a step of ``--accumulate``."""
    bov, standard = Subject(SMALL, options), Subject(with_standard_values(SMALL), options)
    seconds = side_by_side(
        {"bov": bov.forward_backward, "standard": standard.forward_backward}, options.repeats
    )
    seconds |= side_by_side(
        {
            "bov_step": lambda: bov.step(options.accumulate),
            "standard_step": lambda: standard.step(options.accumulate),
        },
        options.repeats,
    )
    return seconds, {
        "bov_vs_standard_forward_backward": seconds["bov"] / seconds["standard"],
        "bov_vs_standard_step": seconds["bov_step"] / seconds["standard_step"],
    }


def fit_against_bare_loop(options: argparse.Namespace) -> tuple[dict, dict]:
    """`bov fit` and a bare loop over the same model, optimizer and batches, step by step in turns.

    The data is packed from Python's standard library, as the quickstart's.
    """
    seconds, ratios = {}, {}
    for name, config, micro in (("", SMALL, BATCH), ("_quickstart", QUICKSTART, 16)):
        bare, fit = _fit_in_turns(config, micro, 2 * options.repeats + 2)
        seconds |= {f"bare{name}": bare, f"fit{name}": fit}
        ratios[f"fit_vs_bare_loop{name}"] = fit / bare
    return seconds, ratios


def _fit_in_turns(config: TransformerConfig, micro: int, n_step: int) -> tuple[float, float]:
    import statistics

    from lightning.pytorch import Callback

    from bov_lightning.recipe.building import build
    from bov_lightning.recipe.given import Given
    from bov_lightning.recipe.overlays import merge, read_yaml
    from bov_lightning.recipe.sameness import plain
    from bov_lightning.recipe.sections import Recipe
    from bov_lightning.training import fit as training

    batch_tokens = micro * config.sequence_len
    bare_model = Transformer(config)
    bare_optimizer = MuonAdamW(build_groups(bare_model, OptimizerConfig(), config, batch_tokens))
    times: dict[str, list[float]] = {"bare": [], "fit": []}

    class Turns(Callback):
        """Measures the step of `bov fit` that just ended, then takes one in a bare loop."""

        began: float | None = None

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            now = harness.clock()
            if self.began is not None:
                times["fit"].append(now - self.began)
            begun = harness.clock()
            bare_model(batch[:, :-1], batch[:, 1:]).backward()
            bare_optimizer.step()
            bare_optimizer.zero_grad()
            times["bare"].append(harness.clock() - begun)
            self.began = harness.clock()

    with tempfile.TemporaryDirectory() as folder:
        overlay = {
            "model": {"config": plain(config), "budget": {"steps": n_step}},
            "batch": {"tokens": batch_tokens, "micro": micro},
            "run": {"root": folder, "name": "fit"},
            "checkpoint": {"every_steps": n_step},
            "validation": {"every_steps": n_step, "tokens": config.sequence_len},
            "evaluation": {"tasks": []},
            "data": {
                "init_args": {
                    "directory": f"{folder}/data",
                    "tokenizer": {"vocab_size": config.vocab_size},
                }
            },
        }
        quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
        settings = merge(read_yaml(quickstart), overlay)
        recipe = build(Recipe, settings, "benchmark")
        # `bov fit` measures steps from the end of one to the end of the next; so does this.
        original = training._callbacks
        training._callbacks = lambda *arguments: [*original(*arguments), Turns()]
        try:
            training.fit(Given(recipe, settings, "benchmark"))
        finally:
            training._callbacks = original
    # The first steps warm up, and the last one saves.
    return statistics.median(times["bare"][2:-1]), statistics.median(times["fit"][1:-1])


def peak_memory(options: argparse.Namespace) -> tuple[dict, dict]:
    """Memory of a step beyond the model and its optimizer, against full fp32 logits, MB."""
    context = multiprocessing.get_context("spawn")
    sizes = {}
    for name in ("chunked", "full"):
        with context.Pool(1) as pool:
            sizes[f"{name}_mb"] = pool.apply(_step_memory, (name == "full",))
    return sizes, {"peak_memory_vs_full_logits": sizes["chunked_mb"] / sizes["full_mb"]}


def _step_memory(full_logits: bool) -> float:
    options = argparse.Namespace(device="cpu", compile=False)
    subject = Subject(LOSS_MEMORY, options)
    if full_logits:
        subject.compute_loss = lambda: F.cross_entropy(
            subject.model(subject.rows[:, :-1]).flatten(0, 1), subject.rows[:, 1:].flatten()
        )
    small = replace(LOSS_MEMORY, sequence_len=128)
    Subject(small, options, 1).step(1)  # what the first step of any model loads
    subject.optimizer.create_state()
    before = _resident_mb()
    subject.step(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def growth(options: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds per token of a micro-step against length, layers and vocabulary; exponents.

    A time that grows as the n-th power of something has the exponent n.
    """
    base = replace(SMALL, d_model=256, n_head=4, n_kv_head=4)
    axes = {
        "T_windows": [(T, replace(base, sequence_len=T, n_layer=4)) for T in (512, 2048, 8192)],
        "T_full": [
            (T, replace(base, sequence_len=T, n_layer=4, window_pattern="L"))
            for T in (512, 2048, 8192)
        ],
        "n_layer": [(n, replace(base, n_layer=n)) for n in (3, 6, 12)],
        "vocab_size": [(n, replace(base, vocab_size=n)) for n in (4096, 16384, 65536)],
    }
    seconds, exponents = {}, {}
    for axis, configs in axes.items():
        found = []
        for size, config in configs:
            # As many tokens for all.
            subject = Subject(config, options, batch=8192 // config.sequence_len)
            time_of = side_by_side({"x": subject.forward_backward}, 3, at_least=0)["x"]
            seconds[f"{axis}_{size}"] = time_of
            found.append((math.log(size), math.log(time_of)))
        exponents[f"exponent_{axis}"] = _slope(found)
    return seconds, exponents


def _slope(points: list[tuple[float, float]]) -> float:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def on_gpu(options: argparse.Namespace) -> tuple[dict, dict]:
    """Tokens/s, MFU and memory of the paper's sizes, against standard values."""
    seconds, ratios = {}, {}
    for name, config, batch in (("135m", SIZE_135M, 32), ("780m", SIZE_780M, 8)):
        torch.cuda.reset_peak_memory_stats()
        bov = Subject(config, options, batch)
        bov.step(4)
        memory = torch.cuda.max_memory_allocated() / 2**30
        standard = Subject(with_standard_values(config), options, batch)
        found = side_by_side(
            {"bov": lambda s=bov: s.step(4), "standard": lambda s=standard: s.step(4)},
            options.repeats,
        )
        tokens_per_s = 4 * batch * config.sequence_len / found["bov"]
        flops = bov.model.flops_per_token() * tokens_per_s
        seconds |= {f"{name}_{key}": value for key, value in found.items()}
        ratios[f"bov_vs_standard_step_{name}"] = found["bov"] / found["standard"]
        ratios[f"mfu_{name}"] = flops / peak_flops(bov.device)
        print(f"{name}: {tokens_per_s:,.0f} tokens/s, {memory:.1f} GiB")
        del bov, standard
    return seconds, ratios


def profile(options: argparse.Namespace) -> None:
    """Prints where a step spends its time, by operator, as Markdown."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    sizes = {"quickstart": (QUICKSTART, 16), "12 layers, d=384": (TWELVE, BATCH),
             "135M": (SIZE_135M, 1)}  # fmt: skip
    for name, (config, batch) in sizes.items():
        subject = Subject(config, options, batch)
        subject.step(1)
        with profiler(activities=[ProfilerActivity.CPU]) as found:
            subject.step(1)
        events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"\n{name}: {total / 1e6:.2f} s\n\n| operator | share | calls |\n| --- | --- | --- |")
        for event in events[:14]:
            print(f"| `{event.key}` | {event.self_cpu_time_total / total:.1%} | {event.count} |")


PARTS: dict[str, Callable[[argparse.Namespace], tuple[dict, dict]]] = {
    "llama": against_llama,
    "standard": against_standard,
    "fit": fit_against_bare_loop,
    "memory": peak_memory,
    "growth": growth,
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="compiled against compiled")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--accumulate", type=int, default=16, help="micro-steps of a step against standard values"
    )
    parser.add_argument("--cpu-time", action="store_true", help="not wall-clock time; one thread")
    parser.add_argument("--profile", action="store_true", help="print a profile and stop")
    options = parser.parse_args()
    if options.cpu_time:
        harness.clock = time.process_time
        torch.set_num_threads(1)
    if options.profile:
        profile(options)
        return
    parts: dict[str, Any] = {"gpu": on_gpu} if options.device == "cuda" else {
        name: PARTS[name] for name in options.only
    }  # fmt: skip
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name, part in parts.items():
        found, related = part(options)
        print(name, {key: round(value, 4) for key, value in (found | related).items()})
        seconds, ratios = seconds | found, ratios | related
    report("train", {**vars(options), "threads": torch.get_num_threads()}, seconds, ratios)


if __name__ == "__main__":
    main()
