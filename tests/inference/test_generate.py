"""`bov generate`: streaming, batches, ends, prompts from files, and what it refuses."""

import io
import json
import random
import sys

import pytest
import torch
from tokenizer_kinds import LIMITED, WHOLE, bring, byte_fallback
from transformers import PreTrainedTokenizerFast
from variants import OVERLAYS, make_model, perturb

from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.inference.decoding import Decoding, TextStream
from bov_lightning.inference.generate import read_prompts
from bov_lightning.inference.sampling import Sampling, choose
from data_modules.tokenizer import (
    TokenizerConfig,
    decide,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
    transformers_tokenizer,
)

TEXT = "import json\nfrom pathlib import Path\n\ndef read(self, path):\n    return path\nµ→é\n"
GREEDY = Sampling(max_new_tokens=30, temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A perturbed model with a tokenizer, complete in itself."""
    folder = tmp_path_factory.mktemp("generate")
    save_tokenizer(train_tokenizer([TEXT], TokenizerConfig(vocab_size=270)), folder / "tokenizer")
    model = perturb(make_model(OVERLAYS["bov"], vocab_size=270, sequence_len=64), smear=0.9)
    write_checkpoint(
        folder / "checkpoint", 3, model.state_dict(), config_yaml(model.config),
        tokenizer=folder / "tokenizer",
    )  # fmt: skip
    return folder / "checkpoint"


@pytest.fixture
def run(checkpoint, capsys):
    """Runs `bov generate`; returns what it printed."""

    def run(*options: str) -> str:
        assert main(["generate", str(checkpoint), "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    return run


def prompts_of(lengths, vocab_size=70):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def decode(model, prompts, sampling, **options) -> list[list[int]]:
    decoding = Decoding(model, prompts, sampling, **options)
    while any(decoding.running):
        decoding.step()
    return decoding.new


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "bov", "first_layer_every"])
@torch.no_grad()
def test_a_batch_gives_every_prompt_what_it_gets_alone(name):
    """Prompts within and beyond a chunk of the prefill, the greedy choice of full forwards."""
    model = perturb(make_model(OVERLAYS[name]), smear=0.9)
    prompts = prompts_of([3, 700, 512, 1])
    together = decode(model, prompts, GREEDY)
    for prompt, new in zip(prompts, together, strict=True):
        assert decode(model, [prompt], GREEDY) == [new]
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new


@pytest.mark.parametrize(
    "how", [pytest.param(("--temperature", "0"), marks=pytest.mark.slow), ("--seed", "5")]
)
def test_steps_as_on_a_gpu_give_the_same_texts(run, monkeypatch, how):
    """Batches of two, two and one; the second uses the first one's step again."""
    prompts = ("import ", "def read(", "f", "return path", "from")
    options = [x for prompt in prompts for x in ("--prompt", prompt)]
    options += ["--batch-size", "2", *how]
    expected = run(*options)
    monkeypatch.setattr("bov_lightning.inference.generate.pays_static", lambda cache: True)
    assert run(*options) == expected


def test_rows_end_one_by_one_and_others_go_on():
    model = perturb(make_model(OVERLAYS["bov"]), smear=0.9)
    prompts = prompts_of([5, 9])
    whole = decode(model, prompts, GREEDY)
    decoding = Decoding(model, prompts, GREEDY)
    for step in range(30):
        assert [token is None for token in decoding.step()] == [step > 3, False]
        if step == 3:
            decoding.end(0)
    assert decoding.new == [whole[0][:4], whole[1]]


def test_a_text_ends_at_max_context():
    model = perturb(make_model(OVERLAYS["bov"]), smear=0.9)
    new = decode(model, prompts_of([10, 20]), GREEDY, max_context=25)
    assert [len(row) for row in new] == [16, 6]


def test_top_k_and_top_p_choose_among_the_likeliest():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]))

    def chosen(**settings) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(temperature=1.0, **settings)
        return {choose(logits, sampling, generator) for _ in range(300)}

    assert chosen() == {0, 1, 2, 3, 4}
    assert chosen(top_k=2) == {1, 2}
    assert chosen(top_p=0.39) == {1}
    assert chosen(top_p=0.41) == {1, 2}
    assert chosen(top_p=0.84) == {1, 2, 3}
    assert chosen(top_k=1, top_p=1.0) == {1}


def test_a_stop_string_across_tokens_is_never_shown(checkpoint):
    from bov_lightning.checkpoint.reading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode("return path µ→é END of it", add_special_tokens=False)
    for stop, expected in (
        (("END",), "return path µ→é "),
        (("→", "END"), "return path µ"),
        (("ENDE",), "return path µ→é END of it"),
        ((), "return path µ→é END of it"),
    ):
        stream, shown = TextStream(tokenizer, stop), ""
        for token in ids:
            shown += stream.push(token)
            assert expected.startswith(shown)
            if stream.stopped:
                break
        assert shown + stream.flush() == expected
        assert stream.stopped == (expected != "return path µ→é END of it")


@pytest.mark.parametrize("decided", [True, False])
@pytest.mark.parametrize("kind", {**WHOLE, **LIMITED})
def test_pieces_behind_the_prompt_are_the_text_of_all_ids(kind, decided, tmp_path):
    """Of random ids, in tokenizers as people bring them and as they are saved."""
    tokenizer = {**WHOLE, **LIMITED}[kind]()
    if decided:
        found = decide(bring(tmp_path / "own", tokenizer), "<s>" if kind == "spelled" else None)
        save_tokenizer(found.tokenizer(), tmp_path / "saved", found.names)
        tokenizer = transformers_tokenizer(tmp_path / "saved")
    else:
        if tokenizer.decoder is None:
            pytest.skip("ids in a row mean nothing without a decoder")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    draw = random.Random(0)
    ids = sorted(tokenizer.get_vocab().values())
    special = set(tokenizer.all_special_ids)
    for _ in range(150):
        prompt = draw.choice(["", "once upon", "read", "once "])
        before = tokenizer.encode(prompt, add_special_tokens=False)
        new = draw.choices(ids, k=draw.randint(0, 40))
        new = [i for i in new if i not in special]
        stream, pieces = TextStream(tokenizer, begins_text=not prompt), []
        for i in new:
            pieces.append(stream.push(i))
        pieces.append(stream.flush())
        whole, shown = tokenizer.decode([*before, *new]), tokenizer.decode(before)
        shown += "".join(pieces)
        assert whole.startswith(shown)
        assert set(whole[len(shown) :]) <= {"\ufffd"}


def test_whole_characters_are_shown_at_once(tmp_path):
    """Of bytes, when the next one cannot change them any more."""
    save_tokenizer(read_tokenizer(bring(tmp_path, byte_fallback())), tmp_path / "saved")
    tokenizer = transformers_tokenizer(tmp_path / "saved")
    stream = TextStream(tokenizer, stop=("STOP",))
    ids = tokenizer.encode("a 🙂 a", add_special_tokens=False)
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) == "a 🙂 a"
    assert shown[0] == "a"
    # What stands in bytes is searched for stop strings, too, at the end as well.
    names = tokenizer.convert_ids_to_tokens(ids)
    end = 1 + max(i for i, name in enumerate(names) if name.startswith("<0x"))
    stream = TextStream(tokenizer, stop=("🙂",))
    shown = "".join(stream.push(i) for i in ids[:end])
    assert not stream.stopped
    assert shown + stream.flush() == "a "


def test_prompts_from_files_and_stdin_are_one(run, workplace, monkeypatch):
    greedy = ("--temperature", "0", "--json")
    one = json.loads(run("--prompt", "def read", *greedy))
    assert one["prompt"] == "def read"
    assert one["tokens"] <= 12
    (workplace / "prompt.txt").write_text("def read")
    assert json.loads(run("--prompt-file", "prompt.txt", *greedy)) == one
    monkeypatch.setattr(sys, "stdin", io.StringIO("def read"))
    assert json.loads(run("--prompt-file", "-", *greedy)) == one

    (workplace / "prompts.jsonl").write_text('{"prompt": "import\\n"}\n{"prompt": "def read"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ndef read\nimport json"))
    for options in (("--prompts", "prompts.jsonl"), ("--prompts", "-", "--batch-size", "1")):
        lines = [json.loads(line) for line in run(*options, *greedy).splitlines()]
        assert lines[1] == one
    assert [line["prompt"] for line in lines] == ["x", "def read", "import json"]


@pytest.mark.slow
def test_live_text_equals_the_collected_one(run):
    options = ("--prompt", "def ", "--seed", "3", "--top-p", "0.95", "--top-k", "50")
    collected = json.loads(run(*options, "--json"))
    assert run(*options) == f"def {collected['text']}\n"
    assert run("--prompt", "x", *options).startswith("x")
    assert collected["text"] == json.loads(run(*options, "--json", "--dtype", "float32"))["text"]
    assert collected["text"] != json.loads(run(*options[:2], "--seed", "4", "--json"))["text"]


def test_statistics_go_to_stderr(checkpoint, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "def ", "--max-new-tokens", "3"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("prompt tokens", "3 new", "first token after", "tokens/s", "cache", "tables 0.06"):
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "path " * 40, "--max-context", "30"], ["max_context is 30", "--max-context"]),
        (["--prompt", "x" * 2000], ["max_context is 640"]),
        (["--max-context", "0"], ["--max-context"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--top-k", "0"], ["--top-k"]),
        (["--stop", ""], ["--stop"]),
        (["--prompt-file", "missing.txt"], ["missing.txt", "cannot be read"]),
        (["--prompts", "bad.jsonl"], ["bad.jsonl line 2", "prompt"]),
        (["--prompts", "empty.txt"], ["empty.txt", "no prompts"]),
        (["--dtype", "int8"], ["--dtype"]),
    ],
)
def test_what_cannot_be_continued_is_refused(checkpoint, workplace, capsys, options, words):
    (workplace / "bad.jsonl").write_text('{"prompt": "x"}\n{"promt": "y"}\n')
    (workplace / "empty.txt").write_text("")
    assert main(["generate", str(checkpoint), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    for word in words:
        assert word in line


def test_empty_prompts_and_foreign_ids_are_refused():
    model = make_model(OVERLAYS["bov"])
    with pytest.raises(UserError, match="empty"):
        Decoding(model, [[1], []], GREEDY)
    with pytest.raises(UserError, match="token id 70"):
        Decoding(model, [[1, 70]], GREEDY).step()


def test_a_model_without_tokenizer_cannot_read_a_prompt(checkpoint, tmp_path, capsys):
    model = make_model(OVERLAYS["bov"])
    write_checkpoint(tmp_path / "bare", 1, model.state_dict(), config_yaml(model.config))
    assert main(["generate", str(tmp_path / "bare")]) == 2
    assert "no tokenizer" in capsys.readouterr().err


SEPARATED = "a\u2028b\x85c\x0cd\x1ee\rf"
"""A prompt with everything that ends a line elsewhere."""


@pytest.mark.parametrize("by", ["file", "stdin", "text stdin"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_prompts_are_what_their_lines_are(workplace, monkeypatch, by, mark, end):
    def read(data: bytes, option: int) -> list[str]:
        name, names = "-", [None, None]
        if by == "file":
            name = "prompts"
            (workplace / name).write_bytes(data)
        elif by == "stdin":
            # As a terminal of another character set has it.
            stdin = io.TextIOWrapper(io.BytesIO(data), encoding="ascii")
            monkeypatch.setattr(sys, "stdin", stdin)
        else:
            monkeypatch.setattr(sys, "stdin", io.StringIO(data.decode("utf-8-sig"), newline=""))
        names[option] = name
        return read_prompts(["given"], *names)

    as_json = json.dumps({"prompt": SEPARATED + "\n"}, ensure_ascii=False).encode()
    data = mark + end.join([as_json, SEPARATED.encode(), b"", b" ", "é 😀".encode()])
    expected = ["given", SEPARATED + "\n", SEPARATED, "é 😀"]
    assert read(data, 1) == read(data + end, 1) == expected
    whole = mark + SEPARATED.encode() + end + b"x"
    assert read(whole, 0) == ["given", f"{SEPARATED}\nx"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": 5}', '"prompt" is int, no text'),
        (b'{"prompt": null}', '"prompt" is NoneType, no text'),
        (b'{"prompt": ["x"]}', '"prompt" is list, no text'),
        (b'{"prompt": "\\ud83d"}', '"prompt" holds half a character'),
        (b'{"promt": "x"}', "no JSON object with a"),
        (b'{"prompt": "x"', "no JSON object with a"),
        (b'{"a":' * 50_000, "no JSON object with a"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(workplace, line, reason):
    (workplace / "p.jsonl").write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"^p.jsonl line 3: .*{reason}"):
        read_prompts([], None, "p.jsonl")


@pytest.mark.parametrize("option", [0, 1])
@pytest.mark.parametrize(("data", "reason"), [(b"caf\xe9", "invalid UTF-8 at byte 3"),
                                              ("x".encode("utf-16"), "UTF-16")])  # fmt: skip
def test_files_and_stdin_that_are_no_text_are_refused(workplace, monkeypatch, option, data, reason):
    (workplace / "p.txt").write_bytes(data)
    for name in ("p.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
        with pytest.raises(UserError, match=f"^prompts in {name} cannot be read: .*{reason}"):
            read_prompts([], *(name if option == i else None for i in (0, 1)))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        read_prompts([], *("-" if option == i else None for i in (0, 1)))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_output_cannot_show_is_replaced(checkpoint, monkeypatch, encoding):
    printed = io.BytesIO()
    for options in (["--prompt", "µ→é"], ["--prompt", "µ→é", "--prompt", "→"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
        assert main(["generate", str(checkpoint), "--max-new-tokens", "3", *options]) == 0
        sys.stdout.flush()
        sys.stdout.detach()
    assert printed.getvalue().count("µ?é".encode(encoding, "replace")) == 2
