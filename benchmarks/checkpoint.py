"""Checkpoints: how long a save holds training up, with and without writing in the background.

python benchmarks/checkpoint.py [--recipe quickstart] [--repeats 5]
python benchmarks/checkpoint.py --device cuda --recipe bov-780m --repeats 2
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import median_seconds, report

from bov_lightning.checkpoint import writing as saving
from bov_lightning.checkpoint.resuming import optimizer_state_of, random_state, weights_of
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.recipe.budget import accumulation
from bov_lightning.recipe.building import build
from bov_lightning.recipe.overlays import fill_vocab_size, find_recipe, read_yaml
from bov_lightning.recipe.sections import Recipe


def main() -> None:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart", help="its model and micro-batch are used")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="JSON file that holds what is known so far")
    known = parser.parse_args()
    settings = fill_vocab_size(read_yaml(find_recipe(known.recipe)))
    recipe = build(Recipe, settings, known.recipe)
    config, device = recipe.model.config, torch.device(known.device)

    if device.type == "cpu":
        torch.set_num_threads(1)
    model = Transformer(config).to(device)
    optimizer = MuonAdamW(build_groups(model, OptimizerConfig(), config, recipe.batch.tokens))
    shape = (recipe.batch.micro, config.sequence_len + 1)
    rows = torch.randint(0, config.vocab_size, shape).to(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def micro_step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        wait()

    def step() -> None:
        micro_step()
        optimizer.step()
        optimizer.zero_grad()
        wait()

    step()
    seconds = {"step": median_seconds(step, known.repeats)}
    seconds["micro_step"] = median_seconds(micro_step, known.repeats)
    optimizer.zero_grad()
    n_micro = accumulation(recipe.batch.tokens, recipe.batch.micro, config.sequence_len, 1)
    seconds["recipe_step"] = seconds["step"] + (n_micro - 1) * seconds["micro_step"]

    ranks = Ranks(None)
    stalls, writes, meanwhile = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = saving.CheckpointWriter(Path(folder), "model: {}", ranks)

        def start() -> None:
            state = optimizer_state_of(model, optimizer)
            state |= random_state(0, device)
            writer.start(1, weights_of(model), state, {}, lambda: None)

        # The first save also makes the buffers that the later ones copy to.
        for turn in range(known.repeats + 1):
            stalls.append(median_seconds(start, 1))
            began = time.perf_counter()
            while turn and writer.writing is not None:
                meanwhile.append(median_seconds(step, 1))
            writer.wait()
            writes.append(time.perf_counter() - began)
            seconds |= {"first_stall": stalls[0], "first_write": writes[0]}
            if turn:
                seconds["stall"] = statistics.median(stalls[1:])
                seconds["write"] = statistics.median(writes[1:])
                seconds["step_meanwhile"] = statistics.median(meanwhile or [float("nan")])
            else:
                seconds["stall"] = stalls[0]
            ratios = {
                "stall_vs_step": seconds["stall"] / seconds["step"],
                "stall_vs_recipe_step": seconds["stall"] / seconds["recipe_step"],
                "first_stall_vs_recipe_step": stalls[0] / seconds["recipe_step"],
                # Alone: while training goes on, writing takes longer.
                "sync_vs_async": (stalls[0] + writes[0]) / seconds["stall"],
                "step_meanwhile_vs_step": seconds.get("step_meanwhile", float("nan"))
                / seconds["step"],
            }
            print({name: round(value, 4) for name, value in seconds.items()}, flush=True)
            if known.output:
                found = {"seconds": seconds, "ratios": ratios}
                known.output.write_text(json.dumps(found), encoding="utf-8")

    n_byte = sum(t.numel() * t.element_size() for t in weights_of(model).values())
    n_byte += sum(
        t.numel() * t.element_size() for t in optimizer_state_of(model, optimizer).values()
    )
    report(
        "checkpoint",
        {
            "recipe": known.recipe,
            "repeats": known.repeats,
            "device": known.device,
            "checkpoint_mb": round(n_byte / 1e6),
        },
        seconds,
        ratios,
    )


if __name__ == "__main__":
    main()
