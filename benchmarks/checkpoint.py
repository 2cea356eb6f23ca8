"""Checkpoints: how long a save holds training up, with and without writing in the background.

python benchmarks/checkpoint.py [--recipe quickstart] [--repeats 5]
"""

import argparse
import sys
import tempfile
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
from bov_lightning.recipe.building import build
from bov_lightning.recipe.overlays import fill_vocab_size, find_recipe, read_yaml
from bov_lightning.recipe.sections import Recipe


def main() -> None:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart", help="its model and micro-batch are used")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many")
    known = parser.parse_args()
    settings = fill_vocab_size(read_yaml(find_recipe(known.recipe)))
    recipe = build(Recipe, settings, known.recipe)
    config = recipe.model.config

    torch.set_num_threads(1)
    model = Transformer(config)
    optimizer = MuonAdamW(build_groups(model, OptimizerConfig(), config, recipe.batch.tokens))
    rows = torch.randint(0, config.vocab_size, (recipe.batch.micro, config.sequence_len + 1))

    def step() -> None:
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    ranks = Ranks(None)
    with tempfile.TemporaryDirectory() as folder:
        writer = saving.CheckpointWriter(Path(folder), "model: {}", ranks)

        def start() -> None:
            state = optimizer_state_of(model, optimizer)
            state |= random_state(0, torch.device("cpu"))
            writer.start(1, weights_of(model), state, {}, lambda: None)

        def save() -> None:
            start()
            writer.wait()

        seconds = {"step": median_seconds(step, known.repeats)}
        seconds["sync"] = median_seconds(save, known.repeats)
        stalls = []
        for _ in range(known.repeats):
            stalls.append(median_seconds(start, 1))
            writer.wait()
        seconds["stall"] = sorted(stalls)[len(stalls) // 2]

    n_byte = sum(t.numel() * t.element_size() for t in weights_of(model).values())
    n_byte += sum(
        t.numel() * t.element_size() for t in optimizer_state_of(model, optimizer).values()
    )
    report(
        "checkpoint",
        {"recipe": known.recipe, "repeats": known.repeats, "checkpoint_mb": round(n_byte / 1e6)},
        seconds,
        {
            "stall_vs_step": seconds["stall"] / seconds["step"],
            "sync_vs_async": seconds["sync"] / seconds["stall"],
        },
    )


if __name__ == "__main__":
    main()
