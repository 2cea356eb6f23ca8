"""What of a tokenizer file is left out for pretraining, and the check that texts stay as they are.

A document is its own characters behind the token that starts it. So whatever a file adds to a text
or takes from it is left out where the vocabulary can do without; what then still changes text is
refused, because bytes could not be counted and texts not be read back.
"""

from typing import Any

from tokenizers import Tokenizer

from bov_lightning.errors import UserError
from data_modules.vocabulary import BYTE, special_ids, token_bytes, unknown_characters

FIRST_SPACE = "the space in front of a text"

TEXTS = (
    "Once upon a time there was a parser.",
    " one space,  two  and\ttabs\n\n  then new lines\r\n and an end ",
    "UPPER lower 0123456789 3.14 (x) [y] {z} <w> \"a\" 'b' #1 $2 %3 &4 *5 +6 ,7 -8 /9",
    ":; = ?! @ ^_`|~ \\\\",
    "naïve café, Straße, Ångström, İstanbul",
    "cafe\u0301 ﬁ ① ２ ½ ™ \u212b \u00a0 \u200b",
    "你好，世界。 日本語 한국어 हिन्दी עברית ไทย",
    "🙂👩‍👩‍👧 €",
)
"""Texts that every kind of normalizer would change."""


def _parts(component: dict | None, key: str) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of what it does."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _parts(inner, key)]


def _whole(parts: list[dict], key: str) -> dict | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", key: parts}


def simplify(content: dict[str, Any]) -> list[str]:
    """Takes out of a tokenizer.json what a document must not undergo; says what that was."""
    left_out = []
    normalizers = _parts(content["normalizer"], "normalizers")
    pre_tokenizers = _parts(content["pre_tokenizer"], "pretokenizers")
    decoders = _parts(content["decoder"], "decoders")
    for kind, name in (("Prepend", FIRST_SPACE), ("NFC", "NFC")):
        if any(part["type"] == kind for part in normalizers):
            left_out.append(name)
            normalizers = [part for part in normalizers if part["type"] != kind]
    for part in (*pre_tokenizers, *decoders):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            part["prepend_scheme"] = "never"
            left_out.append(FIRST_SPACE)
    for part in pre_tokenizers:
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"] = False
            left_out.append(FIRST_SPACE)
    decoders = [part for part in decoders if part["type"] != "Strip" or part["stop"]]
    if not decoders:
        decoders = _decoders_for(normalizers, pre_tokenizers)
    content["normalizer"] = _whole(normalizers, "normalizers")
    content["pre_tokenizer"] = _whole(pre_tokenizers, "pretokenizers")
    content["decoder"] = _whole(decoders, "decoders")
    for name in ("truncation", "padding"):
        if content[name] is not None:
            content[name] = None
            left_out.append(name)
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
        left_out.append("dropout")
    return list(dict.fromkeys(left_out))


def _decoders_for(normalizers: list[dict], pre_tokenizers: list[dict]) -> list[dict]:
    """What a file without a decoder is decoded by: tokens would be joined by spaces otherwise."""
    for part in (*normalizers, *pre_tokenizers):
        if part["type"] == "ByteLevel":
            return [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                     "use_regex": False}]  # fmt: skip
        if part["type"] == "Metaspace":
            return [{**part, "prepend_scheme": "never"}]
    return [{"type": "Fuse"}]


def unspell(content: dict[str, Any]) -> None:
    """Keeps a Unigram model from reading the spelling of special and byte tokens as these."""
    model = content["model"]
    if model["type"] != "Unigram":
        return
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    for entry in model["vocab"]:
        if entry[0] in special or (model.get("byte_fallback") and BYTE.fullmatch(entry[0])):
            # Never the best way to write a text, yet a number to calculate with.
            entry[1] = -1e6


def check(tokenizer: Tokenizer, content: dict[str, Any], origin: str) -> None:
    """Refuses a tokenizer that does not give texts back, or whose bytes do not add up.

    Characters that a small vocabulary lacks are left out of the texts: `unknown_characters`.
    """
    parts = [
        *_parts(content["normalizer"], "normalizers"),
        *_parts(content["pre_tokenizer"], "pretokenizers"), content["model"],
        *_parts(content["decoder"], "decoders"),
    ]  # fmt: skip
    kinds = ", ".join(dict.fromkeys(str(part["type"]) for part in parts))

    def refuse(text: str, what: str) -> None:
        raise UserError(
            f"{origin} cannot be pretrained with: {text!r} {what}, so bytes and texts would be "
            f"wrong (it is made of {kinds}): bring a tokenizer that keeps every text as it is"
        )

    splitter, pair = tokenizer.pre_tokenizer, "a b"
    if splitter is not None:
        if tokenizer.normalizer is not None:
            pair = tokenizer.normalizer.normalize_str(pair)
        ranges = [span for _, span in splitter.pre_tokenize_str(pair)]
        if sum(end - start for start, end in ranges) < len(pair):
            refuse("a b", "loses its space")
    unknown = unknown_characters(tokenizer, "".join(TEXTS))
    n_byte = token_bytes(tokenizer)
    for whole in TEXTS:
        text = "".join(character for character in whole if character not in unknown)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if (back := tokenizer.decode(ids, skip_special_tokens=False)) != text:
            refuse(text, f"comes back as {back!r}")
        if (counted := int(n_byte[ids].sum())) != len(text.encode()):
            refuse(text, f"has {len(text.encode())} bytes, and its tokens {counted}")
    special = special_ids(tokenizer)
    for i in sorted(special):
        text = f"a {tokenizer.id_to_token(i)} b"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if special.intersection(ids) and not unknown_characters(tokenizer, text):
            refuse(text, "becomes a special token, although the characters were meant")
