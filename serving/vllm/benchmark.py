"""Requests per second of vLLM against `transformers`' generate, on one export and in one process.

    .venv-serving/bin/python serving/vllm/benchmark.py [EXPORT]

32 requests at once, of 16 to 512 tokens that ask for 8 to 128 more, greedily, in fp32.
transformers takes them as one padded batch, which ends with its longest answer, or one after the
other. They take turns; each line is the median of the turns. Without EXPORT: a
network of random weights.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

N_REQUEST, TURNS = 32, 3


def requests(vocab_size: int) -> list[tuple[list[int], int]]:
    """Token ids of the prompt, and how many more are asked for."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *size: int) -> list[int]:
        return torch.randint(low, high, size or (1,), generator=generator).tolist()

    # Spread evenly over the logarithm, as lengths of texts are.
    lengths = [round(16 * 2 ** (5 * i / (N_REQUEST - 1))) for i in range(N_REQUEST)]
    asked = [
        round(8 * 2 ** (4 * ((7 * i) % N_REQUEST) / (N_REQUEST - 1))) for i in range(N_REQUEST)
    ]
    return [(draw(0, vocab_size, n), new) for n, new in zip(lengths, asked, strict=True)]


def transformers_batch(model, given: list[tuple[list[int], int]]) -> list[list[int]]:
    """All at once, padded on the left; what is beyond an answer's length is thrown away."""
    longest = max(len(ids) for ids, _ in given)
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in given])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in given])
    n_new = max(new for _, new in given)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [row[longest : longest + new].tolist() for row, (_, new) in zip(out, given, strict=True)]


def transformers_one_by_one(model, given: list[tuple[list[int], int]]) -> list[list[int]]:
    """One after the other."""
    return [transformers_batch(model, [request])[0] for request in given]


def vllm_at_once(llm, given: list[tuple[list[int], int]]) -> list[list[int]]:
    """All at once, as vLLM batches them."""
    from vllm import SamplingParams

    how = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in given]
    prompts = [{"prompt_token_ids": ids} for ids, _ in given]
    outputs = llm.generate(prompts, how, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_export(directory: Path) -> Path:
    """d=384, 6 layers, a vocabulary of 8,192 and a bank in the last third."""
    from safetensors.torch import save_file

    from bov_lightning.interop.hf_export import hf_config
    from bov_lightning.model.config import TransformerConfig
    from bov_lightning.model.transformer import Transformer

    shape = TransformerConfig(
        n_layer=6, n_head=6, n_kv_head=6, d_model=384, vocab_size=8192, sequence_len=512,
        window_pattern="L",
    )  # fmt: skip
    model = Transformer(shape)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("output.weight"):
            p.data.normal_(0, 0.05, generator=generator)
    hf_config(shape, dtype=torch.float32).save_pretrained(directory)
    weights = {f"model.{name}": t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def main() -> None:
    """Prints requests per second and their ratios."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    import bov_lightning.hf  # noqa: F401 (registers the classes)

    folder = tempfile.TemporaryDirectory()
    export = Path(sys.argv[1]) if sys.argv[1:] else random_export(Path(folder.name) / "export")
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    # Answers are not remembered from turn to turn.
    llm = LLM(
        str(export), dtype="float32", skip_tokenizer_init=True, enable_prefix_caching=False,
        max_num_seqs=N_REQUEST, kv_cache_memory_bytes=2**30, max_num_batched_tokens=2048,
        enforce_eager=True,
    )  # fmt: skip
    given = requests(model.config.vocab_size)
    ways = {
        "vLLM": lambda: vllm_at_once(llm, given),
        "transformers, one batch": lambda: transformers_batch(model, given),
        "transformers, one by one": lambda: transformers_one_by_one(model, given),
    }
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(TURNS):
        for name, way in ways.items():
            with torch.inference_mode():
                start = time.perf_counter()
                answers[name] = way()
                seconds[name].append(time.perf_counter() - start)
    first = statistics.median(seconds["vLLM"])
    for name, times in seconds.items():
        median = statistics.median(times)
        same = sum(a == b for a, b in zip(answers[name], answers["vLLM"], strict=True))
        print(
            f"{name:26} {N_REQUEST / median:7.2f} requests/s   vLLM takes "
            f"{first / median:.2f} of its time   {same} of {N_REQUEST} answers equal vLLM's"
        )


if __name__ == "__main__":
    main()
