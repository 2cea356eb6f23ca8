"""A step with value tables in the host's memory, updated by row, against one with whole tables.

python benchmarks/host_tables.py [--rows 65536 262144 1048576] [--tokens 4096] [--repeats 5]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import report, side_by_side

from bov_lightning.distributed.host_tables import keep_tables_on_host
from bov_lightning.distributed.ranks import Ranks
from bov_lightning.distributed.sharding import write_part
from bov_lightning.model.config import TransformerConfig, ValueConfig
from bov_lightning.model.layers import Initialiser
from bov_lightning.model.transformer import Transformer
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW

WIDTH, LENGTH, VOCABULARY = 64, 256, 4096


def main() -> None:
    """Prints one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2**16, 2**18, 2**20])
    parser.add_argument("--tokens", type=int, default=4096, help="per step, in 2 micro-steps")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many turns")
    known = parser.parse_args()
    torch.set_num_threads(1)

    seconds, ratios = {}, {}
    for n_row in known.rows:
        found = side_by_side(
            {where: stepper(n_row, known.tokens, where == "host") for where in ("device", "host")},
            known.repeats,
        )
        seconds |= {f"{where}_{n_row}": value for where, value in found.items()}
        ratios[f"host_vs_device_{n_row}"] = found["host"] / found["device"]
    settings = {"width": WIDTH, "vocabulary": VOCABULARY, "threads": 1, **vars(known)}
    report("host_tables", settings, seconds, ratios)


def stepper(n_row: int, n_token: int, on_host: bool):
    """A function that takes a step of a 3-layer network with one n-gram bank."""
    value = ValueConfig("ngram_bank", [2], "learned", source_args={"n_row": n_row})
    config = TransformerConfig(
        n_layer=3, n_head=2, n_kv_head=2, d_model=WIDTH, vocab_size=VOCABULARY,
        sequence_len=LENGTH, value=value,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    tables = keep_tables_on_host(model, Ranks()) if on_host else None
    model.to_empty(device="cpu")
    model.initialise(Initialiser(0, write_part))
    optimizer = MuonAdamW(build_groups(model, OptimizerConfig(), config, n_token), tables)
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, VOCABULARY + 1)  # Zipf's law

    def step() -> None:
        for _ in range(2):
            shape = (n_token // 2 // LENGTH, LENGTH + 1)
            ids = frequencies.multinomial(
                shape[0] * shape[1], replacement=True, generator=generator
            )
            rows = ids.view(shape)
            (model(rows[:, :-1], rows[:, 1:]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
