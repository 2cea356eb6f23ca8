"""Plain sampling: every token is one forward pass over the whole text so far."""

import sys
from collections.abc import Iterator

import torch

from bov_lightning.checkpoint import load
from bov_lightning.errors import UserError
from bov_lightning.model.transformer import Transformer


@torch.inference_mode()
def sample(
    model: Transformer,
    token_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Continues ``token_ids`` one id at a time, looking back at most ``sequence_len`` tokens.

    Args:
        model: in eval mode.
        token_ids: at least one.
        max_new_tokens: ids to yield.
        temperature: divides the logits; 0 takes the likeliest.
        top_k: choose among so many; None: all.
        seed: of the draw.
    """
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    context = list(token_ids)
    for _ in range(max_new_tokens):
        window = torch.tensor([context[-model.config.sequence_len :]], device=device)
        logits = model(window)[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k is not None:
                kept = logits.topk(min(top_k, len(logits)))
                logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
            probability = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(probability, 1, generator=generator))
        context.append(token)
        yield token


def generate(
    checkpoint: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None,
    seed: int, device: str,
) -> None:  # fmt: skip
    """Prints the prompt and its continuation as it is sampled, up to the end of the document."""
    if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise UserError("--max-new-tokens and --top-k are at least 1, --temperature at least 0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable GPU; use --device cpu")
    model, tokenizer = load(checkpoint, device=device)
    if tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer, so it cannot read a prompt")
    bos = tokenizer.bos_token_id
    ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False)]
    shown = tokenizer.decode(ids[1:])
    print(shown, end="", flush=True)
    for token in sample(model, ids, max_new_tokens, temperature, top_k, seed):
        if token == bos:
            break
        ids.append(token)
        text = tokenizer.decode(ids[1:])
        # A character may need several tokens: wait until its bytes are complete.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(file=sys.stdout)
