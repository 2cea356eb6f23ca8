"""`bov serve` as a user starts it: vLLM's server, its engine in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from conftest import REPOSITORY
from material import make_model

from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.inference.loading import load
from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer

PROMPTS = ["import ", "def read(self, path):", "The value of a token", "x"]


def write_run(folder: Path, overlay: str, module: str | None = None) -> Path:
    """A run directory with a checkpoint whose answers are printable, and its tokenizer.

    ``module``: what the module of its source, one of examples/, is called in its directory.
    """
    pages = [
        path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))
    ]
    tokenizer = train_tokenizer(pages, TokenizerConfig(vocab_size=400))
    save_tokenizer(tokenizer, folder / "tokenizer")
    model = make_model(overlay, "L", vocab_size=400)
    # Greedy answers then hold no halves of characters, which everybody shows in another way.
    for token, i in tokenizer.get_vocab().items():
        if not re.fullmatch(r"[!-~]+", tokenizer.decode([i]).strip() or token):
            model.head.weight.data[i] = 0
    config = config_yaml(model.config)
    if module is not None:
        (folder / "code").mkdir()
        example = REPOSITORY / "examples" / f"{overlay}.py"
        (folder / "code" / f"{module}.py").write_bytes(example.read_bytes())
        assert f"source: {overlay}." in config
        config = config.replace(f"source: {overlay}.", f"source: {module}.")
    write_checkpoint(
        folder / "checkpoints" / "step-00000007", 7, model.state_dict(), config,
        tokenizer=folder / "tokenizer",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", "bov")


def bov(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bov_lightning.cli", *arguments]


def environment(**more: str) -> dict[str, str]:
    """The server's engine has a process of its own."""
    given = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    given |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
    return given | more


@contextmanager
def served(run: Path, said: Path, env: dict[str, str]) -> Iterator[str]:
    """The address that `bov serve` prints; stopped as a user would stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = bov(
        "serve", str(run), "--port", str(port), "--memory", "64MB", "--python", sys.executable,
        "--", "--max-num-seqs", "64", "--enforce-eager",
    )  # fmt: skip
    with said.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + 300
            while "curl " not in said.read_text():
                assert process.poll() is None, said.read_text()[-3000:]
                assert time.monotonic() < deadline, said.read_text()[-3000:]
                time.sleep(0.5)
            text = said.read_text()
            assert f"{run.name} answers at http://127.0.0.1:{port}/v1" in text
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, said.read_text()[-3000:]


@pytest.fixture(scope="module")
def server(run, tmp_path_factory) -> Iterator[str]:
    said = tmp_path_factory.mktemp("server") / "said.txt"
    with served(run, said, environment()) as address:
        yield address


def complete(address: str, prompt: str, **more) -> dict:
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0} | more
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def generated(run: Path, env: dict[str, str]) -> list[str]:
    """What `bov generate` answers."""
    line = bov("generate", str(run), "--temperature", "0", "--max-new-tokens", "24", "--json")
    for prompt in PROMPTS:
        line += ["--prompt", prompt]
    said = subprocess.run(line, capture_output=True, text=True, check=True, env=env)
    return [json.loads(row)["text"] for row in said.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected(run) -> list[str]:
    return generated(run, environment())


def test_answers_are_those_of_generate(server, expected):
    assert [complete(server, prompt)["text"] for prompt in PROMPTS] == expected


def test_a_stream_is_the_same_in_pieces(server, expected):
    body = {"model": "small", "prompt": PROMPTS[1], "max_tokens": 24, "temperature": 0,
            "stream": True}  # fmt: skip
    pieces = []
    with httpx.stream("POST", f"{server}/v1/completions", json=body, timeout=120) as answer:
        for row in answer.iter_lines():
            if row.startswith("data: {"):
                pieces.append(json.loads(row[6:])["choices"][0]["text"])
    assert len(pieces) > 5
    assert "".join(pieces) == expected[1]


def test_log_probabilities_are_the_networks(server, run):
    model, tokenizer = load(run)
    found = complete(server, PROMPTS[2], logprobs=5, max_tokens=6, return_token_ids=True)
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(PROMPTS[2], add_special_tokens=False)]
    assert found["prompt_token_ids"] == prompt
    new = found["token_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
    assert found["logprobs"]["token_logprobs"] == pytest.approx(
        [float(row[i]) for row, i in zip(logits, new, strict=True)], abs=1e-4
    )


def test_structured_output_has_the_structure(server):
    found = complete(server, "x", structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"})
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", found["text"])


def test_64_at_once_get_their_own_answers(server, expected):
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda i: complete(server, PROMPTS[i % 4])["text"], range(64)))
    assert answers == [expected[i % 4] for i in range(64)]


def counter(address: str, name: str, label: str = "") -> float:
    text = httpx.get(f"{address}/metrics", timeout=60).text
    rows = [row for row in text.splitlines() if row.startswith(name) and label in row]
    return sum(float(row.split()[-1]) for row in rows)


def test_who_hangs_up_is_forgotten(server, expected):
    body = {"model": "small", "prompt": "x", "max_tokens": 1200, "temperature": 0, "stream": True,
            "ignore_eos": True}  # fmt: skip
    before = counter(server, "vllm:generation_tokens_total")
    with httpx.stream("POST", f"{server}/v1/completions", json=body, timeout=120) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while counter(server, "vllm:num_requests_running{"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert counter(server, "vllm:generation_tokens_total") - before < 1200
    assert complete(server, PROMPTS[0])["text"] == expected[0]


def test_more_than_fits_is_refused_in_one_line(server):
    body = {"model": "small", "prompt": "x " * 3000, "max_tokens": 4}
    answer = httpx.post(f"{server}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "1280" in answer.json()["error"]["message"]


def test_several_prompts_and_several_answers(server, expected):
    body = {"model": "small", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{server}/v1/completions", json=body, timeout=120).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    body |= {"n": 3, "temperature": 1, "seed": 5}
    answer = httpx.post(f"{server}/v1/completions", json=body, timeout=120).json()
    assert len({choice["text"] for choice in answer["choices"]}) == 3 * len(PROMPTS)


@pytest.mark.slow
def test_a_source_of_ones_own_is_served_to_who_trusts_it(tmp_path):
    """Its module lies in the run's directory and nowhere else; its bank's pages hold keys alone."""
    run = write_run(tmp_path / "own", "bigram_bank", "my_bank")
    known = os.pathsep.join((str(run / "code"), environment()["PYTHONPATH"]))
    for env, words in {
        "nobody": (environment(PYTHONPATH=known), "set BOV_TRUSTED_MODULES=my_bank"),
        "not there": (environment(BOV_TRUSTED_MODULES="my_bank"), "no module my_bank"),
    }.values():
        refused = subprocess.run(
            bov("serve", str(run), "--python", sys.executable), capture_output=True, text=True,
            env=env,
        )  # fmt: skip
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith("bov: error: ")
        assert words in line
    env = environment(PYTHONPATH=known, BOV_TRUSTED_MODULES="my_bank")
    with served(run, tmp_path / "said.txt", env) as address:
        answers = [complete(address, prompt)["text"] for prompt in PROMPTS]
    assert answers == generated(run, env)
