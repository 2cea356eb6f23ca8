"""Makes tests/stored/0.1.0 anew, with the code of commit 991ecb9.

    git worktree add /tmp/991ecb9 991ecb9
    PYTHONPATH=/tmp/991ecb9 OMP_NUM_THREADS=1 python tests/stored/make_0_1_0.py FOLDER

FOLDER must be new. The script also starts itself, as a `bov fit` that a signal stops at a step.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import bov_lightning
from bov_lightning.checkpoint import read_weights
from data_modules.tokenizer import BOS, SPLIT_PATTERN, save_tokenizer

STEP, LAST = 6, 12
SENTENCES = (
    "The {a} {n} {v} the {m} near the {p}.",
    "A {n} that {v} a {m} is {a}.",
    "In the {p} the {n} and the {m} {w}.",
    "{k} plus {l} is {s}.",
    "If the {n} is {a}, the {m} {v} it.",
    "{k} {n}s and {l} {m}s {w} in the {p}.",
)
NOUNS = [
    "cat",
    "dog",
    "bird",
    "horse",
    "fish",
    "mouse",
    "fox",
    "frog",
    "lamb",
    "crow",
    "goat",
    "bear",
]
WORDS = {
    "a": ["old", "small", "quick", "quiet", "brown", "green", "happy", "hungry"],
    "n": NOUNS,
    "m": NOUNS,
    "v": ["sees", "hears", "follows", "finds", "likes", "meets", "watches"],
    "w": ["sleep", "play", "wait", "sing", "swim", "rest"],
    "p": ["river", "garden", "forest", "house", "field", "bridge", "barn", "harbour"],
}
NUMBERS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]

TINY = {
    "model": {
        "config": {
            "n_layer": 2, "n_head": 3, "n_kv_head": 1, "d_model": 24, "vocab_size": 120,
            "sequence_len": 64, "window_pattern": "SL",
            "value": {
                "source": "bank", "layers": "last_third", "coefficient": "learned",
                "add_context": False, "shared": False,
            },
        },
        # In fp32, so that another CPU ends as near as may be.
        "optimizer": {"warmup_steps": 3, "weight_decay": 0.1, "muon_dtype": "float32"},
        "budget": {"steps": LAST},
    },
    "batch": {"tokens": 512, "micro": 4},
    "run": {"name": "stored"},
    "checkpoint": {"every_steps": 100, "keep_last": 1},
    "validation": {"every_steps": 4, "tokens": 1280},
    "evaluation": {"tasks": []},
    "data": {
        "class_path": "data_modules.PackedDataModule",
        "init_args": {
            "directory": "packed",
            "source": {
                "class_path": "data_modules.TextFiles",
                "init_args": {"train": ["text/train.jsonl"], "val": ["text/val.jsonl"]},
            },
            "tokenizer": {"path": "text/tokenizer"},
        },
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
}  # fmt: skip
SHARDED = {
    "model": {"config": {"n_layer": 1, "value": {"layers": [0]}}},
    "batch": {"micro": 2},
    "run": {"name": "sharded"},
    "trainer": {
        "devices": 2,
        "strategy": {"class_path": "bov_lightning.strategy.ShardedStrategy", "init_args": {}},
    },
}


def document(chance: random.Random) -> str:
    """Some sentences, together of about the length of half a row."""
    text = []
    while len(" ".join(text)) < 90:
        k, m = chance.randrange(6), chance.randrange(6)
        words = {kind: chance.choice(options) for kind, options in WORDS.items()}
        words |= {"k": NUMBERS[k], "l": NUMBERS[m], "s": NUMBERS[k + m + 1]}
        sentence = chance.choice(SENTENCES).format(**words)
        text.append(sentence[0].upper() + sentence[1:])
    return " ".join(text)


def write_text(folder: Path) -> None:
    folder.mkdir()
    chance = random.Random(0)
    for name, n_document in (("train", 200), ("val", 50)):
        lines = [json.dumps({"text": document(chance)}) + "\n" for _ in range(n_document)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_tokenizer(text: Path) -> None:
    """Of 120 tokens: one with all bytes would make the tables, and these files, twice as large."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[BOS], show_progress=False)
    lines = (text / "train.jsonl").read_text().splitlines()
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
    save_tokenizer(tokenizer, text / "tokenizer")


def bov(*arguments: str, stop_at: int | None = None, code: int = 0, **environment: str) -> str:
    """What the command printed."""
    program = ["-m", "bov_lightning.cli"] if stop_at is None else [os.path.abspath(__file__)]
    variables = {**os.environ, "BOV_STOP_AT": str(stop_at), **environment}
    command = [sys.executable, *program, *arguments]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert done.returncode == code, done
    return done.stdout


def keep_end(run: Path, target: Path) -> None:
    """Of a finished run: the curve, and every fourth weight."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    target.mkdir()
    shutil.copy(run / "metrics.csv", target)
    weights = {name: t.flatten()[::4].contiguous() for name, t in read_weights(checkpoint).items()}
    save_file(weights, target / "every_fourth_weight.safetensors")
    shutil.rmtree(run)


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    root = folder.resolve()
    os.chdir(folder)
    write_text(Path("text"))
    write_tokenizer(Path("text"))
    Path("recipe.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    Path("sharded.yaml").write_text(yaml.safe_dump(SHARDED, sort_keys=False))
    one, two = ["--config", "recipe.yaml"], ["--config", "recipe.yaml", "--config", "sharded.yaml"]
    for name, recipe, finished in (
        ("stored", one, "finished"), ("sharded", two, "sharded-finished"),
    ):  # fmt: skip
        bov("fit", *recipe)
        keep_end(Path("runs") / name, Path(finished))
        bov("fit", *recipe, stop_at=STEP, code=75)
    run = Path("runs/stored")
    output = str(run / "eval" / f"step-{STEP:08d}")
    heldout = ["--tasks", "heldout", "--max-per-task", "6"]
    bov("evaluate", str(run), *heldout, "--output", output)
    bov("export", str(run), "--output", "export")
    greedily = ["--prompt", "The quick fox", "--temperature", "0", "--max-new-tokens", "12"]
    printed = {
        "validate": bov("validate", str(run)),
        "validate sharded": bov("validate", "runs/sharded", "--trainer.devices", "1"),
        "generate": bov("generate", str(run), *greedily),
    }
    Path("printed.json").write_text(json.dumps(printed, indent=1) + "\n")

    checkout = str(Path(bov_lightning.__file__).parent.parent)
    for file in run.glob("eval/*/*.json*"):
        file.write_text(file.read_text().replace(checkout, "/checkout"))

    Path("bin").mkdir()
    Path("bin/sbatch").write_text("#!/bin/sh\necho Submitted batch job 1\n")
    Path("bin/sbatch").chmod(0o755)
    job = ["--nodes", "1", "--tasks-per-node", "1", "--time", "1:00:00"]
    bov("submit", *one, *job, PATH=f"{root}/bin:{os.environ['PATH']}")
    Path("job").mkdir()
    for name in ("submit.sbatch", "recipe.yaml"):
        text = (run / name).read_text()
        text = text.replace(sys.executable, "@PYTHON@").replace(str(root), "@ROOT@")
        (Path("job") / name).write_text(text)
        (run / name).unlink()

    run.rename("run")
    Path("runs/sharded").rename("sharded")
    # TensorBoard's events hold the host's name.
    for path in root.glob("*/events.*"):
        path.unlink()
    for name in ("bin", "packed", "runs"):
        shutil.rmtree(name)


def fit_and_stop(step: int) -> None:
    """`bov fit` on a rank that is told at ``step`` that its time limit is near."""
    from bov_lightning.control import Control

    from bov_lightning import preemption
    from bov_lightning.cli import entry_point

    told = Control.on_train_batch_end

    def tell(self, trainer, *arguments) -> None:
        if trainer.global_step == step and trainer.is_global_zero and not preemption.received():
            os.kill(os.getpid(), signal.SIGUSR1)
        told(self, trainer, *arguments)

    Control.on_train_batch_end = tell
    entry_point()


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        fit_and_stop(int(os.environ["BOV_STOP_AT"]))
    else:
        make(Path(sys.argv[1]))
