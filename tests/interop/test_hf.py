"""Exports: equal to their source, self-contained, at home in transformers and lm-eval, and back."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from variants import OVERLAYS, WAYS, make_model, mostly_slow, perturb, token_ids

import bov_lightning
import bov_lightning.hf
from bov_lightning.checkpoint.directory import MARKER
from bov_lightning.checkpoint.reading import read_weights
from bov_lightning.checkpoint.writing import config_yaml, write_checkpoint
from bov_lightning.cli import main
from bov_lightning.inference.decoding import Decoding
from bov_lightning.inference.sampling import Sampling
from bov_lightning.interop.hf_export import export
from bov_lightning.interop.hf_import import import_hf
from bov_lightning.interop.hf_model import BoVCache, BoVForCausalLM
from bov_lightning.interop.hf_source import modelling_source
from data_modules.tokenizer import TokenizerConfig, save_tokenizer, train_tokenizer

TEXT = "import json\nfrom pathlib import Path\n\ndef read(self, path):\n    return path\n"


def write(folder: Path, name: str = "bov", **shape) -> Path:
    """A perturbed checkpoint with a tokenizer."""
    save_tokenizer(train_tokenizer([TEXT], TokenizerConfig(vocab_size=262)), folder / "tokenizer")
    shape = {"vocab_size": 262, "sequence_len": 512} | shape
    model = perturb(make_model(OVERLAYS[name], **shape), smear=0.9)
    write_checkpoint(
        folder / "checkpoint", 7, model.state_dict(), config_yaml(model.config),
        tokenizer=folder / "tokenizer",
    )  # fmt: skip
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    assert export(write(folder), folder / "export") < 1e-5
    return folder / "export"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(value, tmp_path, capsys):
    checkpoint = write(tmp_path)
    weights = read_weights(checkpoint)
    name = next(name for name in weights if "blocks.1.mlp" in name)
    weights[name][0, 0] = value
    config = (checkpoint / "config.yaml").read_text()
    write_checkpoint(tmp_path / "bad", 7, weights, config, tokenizer=tmp_path / "tokenizer")
    bad, out = str(tmp_path / "bad"), tmp_path / "out"
    assert main(["export", bad, "--output", str(out)]) == 2
    assert f"not finite: {name} holds 1 of" in capsys.readouterr().err
    assert not out.exists()
    for temperature in ("0", "1"):
        assert main(["generate", bad, "--prompt", "a", "--temperature", temperature]) == 2
        assert "no token can be chosen" in capsys.readouterr().err


@pytest.mark.slow
def test_every_end_token_of_an_export_ends_a_text_and_comes_back(exported, tmp_path, capsys):
    def text(path: Path) -> tuple[str, int]:
        prompt = ["--prompt", "import ", "--temperature", "0", "--max-new-tokens", "12", "--json"]
        assert main(["generate", str(path), *prompt]) == 0
        line = json.loads(capsys.readouterr().out)
        return line["text"], line["tokens"]

    free, n_token = text(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.tensor([tokenizer.encode("import ")])
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    at = next(i for i in range(1, n_token) if new[i] not in new[:i])
    other = shutil.copytree(exported, tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], new[at]]
    (other / "generation_config.json").write_text(json.dumps(settings))
    assert text(other) == (tokenizer.decode(new[:at]), at)
    import_hf(other, tmp_path / "back")
    assert text(tmp_path / "back") == text(other)
    export(tmp_path / "back", tmp_path / "again")
    assert text(tmp_path / "again") == text(other)
    assert text(exported)[0] == free


def test_files_of_two_exports_in_one_folder_are_refused(exported, tmp_path, capsys):
    both = shutil.copytree(exported, tmp_path / "both")
    shutil.copy(both / "model.safetensors", both / "model-00001-of-00001.safetensors")
    assert main(["generate", str(both), "--prompt", "a"]) == 2
    assert "twice" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(exported) -> BoVForCausalLM:
    """Without remote code, since the classes are registered."""
    return AutoModelForCausalLM.from_pretrained(exported).eval()


SAVED = {"bov", "value_embedding_gated"}
"""Variants that `transformers` saves once more: the same files, whatever the values are."""


@pytest.mark.parametrize("name", mostly_slow(WAYS, {"bov"}, outside=False))
@torch.no_grad()
def test_variants_of_every_way_go_out_and_come_back(name, tmp_path):
    source = write(tmp_path, name, n_layer=3, window_pattern="SL")
    export(source, tmp_path / "export")
    ids = token_ids(200)
    expected = bov_lightning.load(source)[0](ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(theirs) is BoVForCausalLM
    assert (theirs(ids).logits - expected).abs().max() < 1e-5

    ours, tokenizer = bov_lightning.load(tmp_path / "export")
    assert torch.equal(ours(ids), expected)
    assert tokenizer.decode(tokenizer.encode("def read", add_special_tokens=False)) == "def read"

    directories = ["export"]
    if name in SAVED:
        theirs.save_pretrained(tmp_path / "again")
        directories.append("again")
    for directory in directories:
        back = tmp_path / f"back-{directory}"
        import_hf(tmp_path / directory, back)
        assert torch.equal(bov_lightning.load(back)[0](ids), expected)
    assert bov_lightning.load(tmp_path / "back-export")[1] is not None


CLEAN = """
import sys
sys.path.append({packages!r})
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for export in {exports!r}:
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    inputs = tokenizer("def read", return_tensors="pt")
    with torch.no_grad():
        logits = model(torch.load({ids!r})).logits
    found.append([logits, model.generate(**inputs, max_new_tokens=20, do_sample=False)])
torch.save(found, {out!r})
print(sorted(name for name in sys.modules if name.partition(".")[0] in {foreign!r}))
"""


def requirements_of(*names: str) -> set[str]:
    """Distributions that these need, themselves included, as far as they are installed."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = re.split(r"[^\w.-]", pending.pop())[0]
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.name in found:
            continue
        found.add(distribution.name)
        pending += [r for r in distribution.requires or [] if "extra ==" not in r]
    return found


@pytest.mark.slow
def test_exports_load_where_only_torch_and_transformers_are(exported, tmp_path):
    """An isolated interpreter whose path holds these two and what they need, nothing else.

    One export's value source is the package's, the other's is a module of somebody's own.
    """
    export(write(tmp_path, "low_rank_bank"), tmp_path / "own")
    exports = [str(exported), str(tmp_path / "own")]
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in requirements_of("torch", "transformers"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    assert not (packages / "lightning").exists()
    ids, out = tmp_path / "ids.pt", tmp_path / "out.pt"
    torch.save(token_ids(100), ids)
    foreign = ["bov_lightning", "low_rank_bank", "lightning", "datasets", "jsonargparse"]
    program = CLEAN.format(
        packages=str(packages), exports=exports, ids=str(ids), out=str(out), foreign=foreign
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    tokenizer = bov_lightning.load(exported)[1]
    for (logits, tokens), checkpoint in zip(
        torch.load(out), (exported, tmp_path / "checkpoint"), strict=True
    ):
        source, _ = bov_lightning.load(checkpoint)
        assert (logits - source(token_ids(100))).abs().max() < 1e-5
        prompt = tokenizer.encode("def read")
        assert prompt[0] == tokenizer.bos_token_id
        assert tokens[0].tolist() == prompt + greedy(source, prompt, 20, tokenizer.bos_token_id)


def greedy(model, prompt: list[int], n: int, end: int | None = None) -> list[int]:
    decoding = Decoding(model, [prompt], Sampling(n, temperature=0))
    while any(decoding.running):
        if decoding.step()[0] == end:
            break
    return decoding.new[0]


def test_the_modelling_file_imports_only_torch_and_transformers():
    source = modelling_source()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    # Triton comes with CUDA builds of torch; the file tries it and goes on without.
    assert not imported - {"torch", "transformers", "triton"} - sys.stdlib_module_names
    assert source.count("class Transformer(") == source.count("class BankOfValues(") == 1


@pytest.mark.slow
def test_generate_gives_the_tokens_of_bov_generate(model):
    """Alone and padded on the left, greedily and by beams that reorder the cache."""
    prompts = [token_ids(n, 1).tolist()[0] for n in (140, 3, 600)]
    options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    longest = max(map(len, prompts))
    padded = torch.zeros(3, longest, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
        alone = model.generate(
            torch.tensor([prompt]), attention_mask=mask[row : row + 1, -len(prompt) :], **options
        )
        assert alone[0, len(prompt) :].tolist() == greedy(model.model, prompt, 25)
    together = model.generate(padded, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        assert together[row, longest:].tolist() == greedy(model.model, prompt, 25)

    ids, ones = torch.tensor(prompts[:1]), torch.ones(1, 140, dtype=torch.int64)
    cached = model.generate(ids, attention_mask=ones, num_beams=3, **options)
    plain = model.generate(ids, attention_mask=ones, num_beams=3, use_cache=False, **options)
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_forward_takes_padding_labels_and_a_cache(model):
    ids = token_ids(60)
    whole = model(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    mask[1, 50:] = 0
    padded = model(ids, attention_mask=mask).logits
    assert torch.allclose(padded[0, 20:], model(ids[:1, 20:]).logits[0], atol=1e-5)
    assert torch.allclose(padded[1, :50], whole[1, :50], atol=1e-5)
    assert torch.allclose(model(ids, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5)

    labels = ids.clone()
    labels[:, :30] = -100
    expected = torch.nn.functional.cross_entropy(
        whole[:, 29:-1].flatten(0, 1), ids[:, 30:].flatten()
    )
    assert torch.allclose(model(ids, labels=labels).loss, expected, atol=1e-5)

    cache = BoVCache(60)
    first = model(ids[:, :40], past_key_values=cache)
    second = model(ids[:, 40:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5)
    assert cache.get_seq_length() == 60
    assert cache.nbytes == cache.past.nbytes
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert cache.past.lengths.tolist() == [60] * 3
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(3)


def test_an_export_carries_everything(exported):
    config = AutoConfig.from_pretrained(exported)
    assert config.num_hidden_layers == 6
    assert config.max_position_embeddings == 5120
    assert config.training_step == 7
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("def").input_ids[0] == tokenizer.bos_token_id == tokenizer.pad_token_id
    card = (exported / "README.md").read_text()
    for text in ("2606.02780", "parameters", "optimizer steps | 7", "source bank"):
        assert text in card
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.slow
def test_half_precision_exports(tmp_path):
    assert export(write(tmp_path), tmp_path / "half", torch.bfloat16) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.slow
def test_the_stock_model_of_lm_eval_runs_on_it(exported, tmp_path):
    """Log-likelihoods as our own forward computes them, and text that generate_until returns."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    documents = [
        {"query": "def read(self,", "choices": [" path)", " json"], "gold": 0},
        {"query": "import", "choices": [" json\\nfrom", " path"], "gold": 0},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{common}output_type: multiple_choice\ndoc_to_text: query\n"
        "doc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ''\n"
    )
    (tmp_path / "free.yaml").write_text(
        f"task: free\n{common}output_type: generate_until\ndoc_to_text: query\n"
        'doc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    result = simple_evaluate(
        model="hf", model_args=f"pretrained={exported},trust_remote_code=True,dtype=float32",
        tasks=["choice", "free"], device="cpu", batch_size=2, log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    source, tokenizer = bov_lightning.load(exported)
    for sample in result["samples"]["choice"]:
        for choice, (found, _) in zip(
            sample["doc"]["choices"], [r[0] for r in sample["resps"]], strict=True
        ):
            context = tokenizer.encode(sample["doc"]["query"], add_special_tokens=False)
            whole = tokenizer.encode(sample["doc"]["query"] + choice, add_special_tokens=False)
            context, whole = [0, *context], [0, *whole]
            with torch.no_grad():
                logp = source(torch.tensor([whole]))[0].log_softmax(-1)
            tokens = range(len(context), len(whole))
            expected = sum(logp[i - 1, whole[i]].item() for i in tokens)
            assert float(found) == pytest.approx(expected, abs=1e-3)
    assert all(sample["resps"][0][0] is not None for sample in result["samples"]["free"])


def test_export_and_import_from_the_command_line(tmp_path, capsys):
    source = write(tmp_path)
    out = str(tmp_path / "out")
    assert main(["export", str(source), "--output", out]) == 0
    assert "logits equal" in capsys.readouterr().out
    greedily = ["--prompt", "def ", "--temperature", "0", "--max-new-tokens", "9"]
    texts = []
    assert main(["import", "hf", out, "--output", str(tmp_path / "back")]) == 0
    capsys.readouterr()
    for directory in (source, out, tmp_path / "back"):
        assert main(["generate", str(directory), *greedily]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert set(read_weights(tmp_path / "back")) == set(read_weights(source))


def test_what_cannot_be_exported_leaves_nothing(tmp_path, capsys):
    source = write(tmp_path)
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "file").write_text("mine")
    broken, incomplete = tmp_path / "broken", tmp_path / "incomplete"
    for copy in (broken, incomplete):
        source.rename(copy) if copy is incomplete else _copy(source, copy)
    (incomplete / MARKER).unlink()
    (broken / "config.json").write_text('{"model_type": "bov", "n_head": 3, "d_model": 64}')
    before = sorted(tmp_path.rglob("*"))
    for command, words in (
        (["export", incomplete, "--output", tmp_path / "new"], "no checkpoint"),
        (["export", tmp_path / "nowhere", "--output", tmp_path / "new"], "does not exist"),
        (["export", filled / "file", "--output", filled], "filled exists and is not empty"),
        (["import", "hf", filled, "--output", tmp_path / "new"], "is no export"),
        (["import", "hf", broken, "--output", filled], "is not empty"),
        (["import", "hf", broken, "--output", tmp_path / "new"], "n_head"),
    ):
        assert main([str(part) for part in command]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert words in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


@pytest.mark.slow
@pytest.mark.parametrize("d_mlp", ["like_bank", 40])
@torch.no_grad()
def test_mlps_of_any_width_go_out_and_come_back(d_mlp, tmp_path):
    source = write(tmp_path, "standard", n_layer=3, d_mlp=d_mlp)
    ids = token_ids(60)
    expected = bov_lightning.load(source)[0](ids)
    export(source, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert (theirs(ids).logits - expected).abs().max() < 1e-5
    import_hf(tmp_path / "export", tmp_path / "back")
    assert torch.equal(bov_lightning.load(tmp_path / "back")[0](ids), expected)
