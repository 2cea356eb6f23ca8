"""`bov_lightning.probe` and `bov probe`: oracles, equal numbers however computed, going on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from evaluation_material import make_llama, tiny
from safetensors.torch import load_file, save_file
from variants import make_model, perturb

import bov_lightning
from bov_lightning import ProbeSettings
from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.value_probe.calibration import Table
from bov_lightning.value_probe.content import make_report
from bov_lightning.value_probe.measuring import Bench, Condition, Order, Tally
from bov_lightning.value_probe.places import find_places, values
from bov_lightning.value_probe.probing import _backend
from bov_lightning.value_probe.rows import Rows

FEW = ProbeSettings(tokens=1500, held_out=700, row_length=24, own_rows="0,64", precision=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama_result(tokenizer, texts):
    return bov_lightning.probe(make_llama(num_hidden_layers=3), tokenizer, texts, FEW)


def approximately(result, other, tolerance: float) -> None:
    """All numbers are equal to rounding, everything else is the same."""

    def compare(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b)
            for i, pair in enumerate(zip(a, b, strict=True)):
                compare(*pair, f"{where}[{i}]")
        elif isinstance(a, float):
            assert a == pytest.approx(b, abs=tolerance), where
        else:
            assert a == b, where

    compare(result.as_dict(), other.as_dict(), "")


def test_the_first_layer_of_a_llama_needs_no_context(llama_result):
    """Its values are made of the token's embedding alone, seen in calibration or not."""
    first, *others = llama_result.layers
    assert first.context_free
    assert abs(first.cost.nats) < 1e-5
    assert abs(first.cost.kl) < 1e-5
    assert first.cost.agreement == 1
    assert first.explained > 1 - 1e-6
    assert llama_result.order[0] == 0
    for layer in others:
        assert not layer.context_free
        assert layer.cost.kl > 0.01
        assert layer.explained < 0.9
    assert llama_result.curve[0].saved_share == pytest.approx(1 / 3)
    assert llama_result.curve[0].break_even_tokens == 300


@pytest.mark.slow
def test_bank_layers_of_our_own_cost_nothing(tokenizer, texts):
    """Also for ids that calibration has not seen: the model is asked for them."""
    bank = {"source": "bank", "coefficient": "learned"}
    model = perturb(make_model(bank, vocab_size=300, sequence_len=24, window_pattern="L"), 0.3)
    result = bov_lightning.probe(model, tokenizer, texts, replace(FEW, tokens=240))
    for layer in result.layers:
        assert layer.cached == (layer.layer not in (4, 5))
        assert layer.context_free != layer.cached  # the smear gives layer 0 a context
        if not layer.cached:
            assert layer.explained > 1 - 1e-6
            assert abs(layer.cost.nats) < 1e-5
        else:
            assert layer.cost.kl > 1e-3
    assert result.order[:2] == [4, 5]
    assert result.last_third.saved_bytes_per_token == 0
    assert result.last_third.break_even_tokens is None


@pytest.mark.slow
def test_values_that_are_noise_are_not_explained(tokenizer, texts):
    """A token has others after each other text, with nothing in common."""
    model = tiny("gpt2", {})
    noise = torch.randn(5003, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    model.transformer.wte.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))

    def noisy(module, inputs, out):
        ids = seen[-1]
        mixed = ids * 389 + ids.cumsum(1) * 31
        return torch.cat((out[..., :-48], noise[mixed % len(noise)]), dim=-1)

    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(noisy)
    settings = replace(FEW, tokens=9000, row_length=96)
    result = bov_lightning.probe(model, tokenizer, texts, settings)
    for layer in result.layers:
        assert abs(layer.explained) < 0.03
        assert max(map(abs, layer.explained_per_head)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_table_by_token_and_position_changes_nothing(kind):
    """Of the text itself, in all layers together: the loss is that of the model."""
    model = tiny(kind, {})
    ids = torch.randint(1, 300, (4, 20), generator=torch.Generator().manual_seed(5))
    keys = torch.arange(ids.numel()).view_as(ids)
    places, found = find_places(model), {}
    with values(places, lambda place, v: found.__setitem__(place.layer, v.flatten(0, 1))):
        model(ids)
    tables = {n: Table(v, v.roll(1, 0), 0.0, False, False) for n, v in found.items()}
    bench = Bench(model, _backend(model), places, tables, keys.flatten(), 0)
    computed = bench.compute(Rows(ids, keys))
    everything = tuple(range(len(places)))
    lasts = [bench.change(computed, Condition(everything, n)).outputs[-1] for n in (None, 0)]
    base, (same, other) = bench.compare(computed, lasts)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    torch.testing.assert_close(base[:, 0].float(), expected)
    assert same[:, :2].abs().max() < 1e-3
    assert torch.equal(same[:, 2], same[:, 3])
    assert other[:, 1].min() > 1  # rows of the next key: another text's values


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_sets_have_in_common_is_not_computed_again(kind):
    """Beside any others, a set gives what it gives alone."""
    model = tiny(kind, {"num_hidden_layers": 4})
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(5))
    places, draw = find_places(model), torch.Generator().manual_seed(6)
    tables = {}
    for place in places:
        own, other = torch.randn(2, 300, place.n_head, place.head_dim, generator=draw)
        tables[place.layer] = Table(own, other, 0.0, False, False)
    bench = Bench(model, _backend(model), places, tables, torch.arange(300), 0)
    computed = bench.compute(Rows(ids, ids))
    sets = [(0,), (0, 2), (0, 1, 2), (3,), (0, 1, 2, 3)]
    conditions = [Condition(layers, n) for layers in sets for n in (None, 40)]
    used, near = [], []
    with values(places, lambda place, v: used.append(place.layer)):
        for condition in conditions:
            near.append(bench.change(computed, condition, near))
    alone = [bench.change(computed, condition) for condition in conditions]
    for one, other in zip(near, alone, strict=True):
        torch.testing.assert_close(one.outputs, other.outputs, rtol=0, atol=0)
        assert len(one.outputs) == 4
    assert used.count(3) == len(conditions)
    assert [used.count(layer) for layer in (0, 1, 2)] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"batch_size": 1}, {"batch_size": 8}])
def test_numbers_do_not_depend_on_the_batch(changed, llama_result, tokenizer, texts):
    model = make_llama(num_hidden_layers=3)
    result = bov_lightning.probe(model, tokenizer, texts, replace(FEW, **changed))
    approximately(result, llama_result, 2e-5)


@pytest.mark.slow
def test_numbers_do_not_depend_on_threads_or_memory(llama_result, tokenizer, texts):
    """Little memory: each layer takes a pass of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        model = make_llama(num_hidden_layers=3)
        result = bov_lightning.probe(model, tokenizer, texts, replace(FEW, memory=1e-6))
    finally:
        torch.set_num_threads(before)
    approximately(result, llama_result, 2e-5)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_probe_that_is_killed_goes_on(llama_result, tokenizer, texts, tmp_path):
    """Killed again and again, ever later: nothing is lost but what was not kept yet."""
    steps: list[tuple[str, int]] = []

    def dying_at(limit: int):
        steps.clear()

        def progress(what: str, done: int, total: int) -> None:
            steps.append((what, done))
            if len(steps) == limit:
                raise KilledError

        return progress

    def run(progress):
        return bov_lightning.probe(
            make_llama(num_hidden_layers=3), tokenizer, texts, FEW, state_directory=tmp_path / "s",
            progress=progress,
        )  # fmt: skip

    begun = []
    for limit in (12, 8, 3, 2):
        with pytest.raises(KilledError):
            run(dying_at(limit))
        begun.append(steps[0])
    assert begun[0] == ("rows calibrated", 4)
    assert begun[1][0] == "rows calibrated"
    assert begun[1][1] > 40
    assert begun[2][0] == "sets compared"
    assert begun[3] == ("held-out rows measured", 12)
    result = run(dying_at(-1))
    assert steps[0][0] == "held-out rows measured"
    assert result.as_dict() == llama_result.as_dict()
    assert run(dying_at(-1)).as_dict() == result.as_dict()
    assert steps == []
    # What only measuring depends on leaves the tables and the order as they are.
    settings = replace(FEW, precision=3)
    again = bov_lightning.probe(
        make_llama(num_hidden_layers=3), tokenizer, texts, settings,
        state_directory=tmp_path / "s", progress=dying_at(-1),
    )  # fmt: skip
    assert {what for what, _ in steps} == {"held-out rows measured"}
    assert again.order == result.order
    # Of another text nothing is taken.
    other = bov_lightning.probe(
        make_llama(num_hidden_layers=3), tokenizer, texts[1:], FEW, state_directory=tmp_path / "s"
    )
    assert other.nats != result.nats


@pytest.mark.slow
def test_the_model_is_left_as_it_was(llama_result, tokenizer, texts):
    model = make_llama(num_hidden_layers=3).train()
    model.lm_head.weight.requires_grad_(False)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        bov_lightning.probe(model, tokenizer, texts, replace(FEW, layers="0"))
        assert torch.equal(model(ids).logits, before)
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not any(m._forward_hooks for m in model.model.modules())


class _Costs(Order):
    """Costs that grow where layers go together, as they mostly do."""

    def __init__(self, n: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.alone = torch.rand(n, generator=draw)
        self.together = torch.rand(n, n, generator=draw)
        self.bench, self.n_call, self._near = type("Bench", (), {"free": set()}), 0, []

    def cost(self, layers):
        self.n_call += 1
        index = torch.tensor(layers)
        return float(self.alone[index].sum() + self.together[index][:, index].sum() / 10)


@pytest.mark.parametrize("seed", range(5))
def test_lazy_search_finds_the_greedy_order(seed, monkeypatch):
    monkeypatch.setattr(Order, "TRIES", 8)
    order = _Costs(8, seed)
    found = order(list(range(8)))
    n_lazy, expected = order.n_call, []
    while len(expected) < 8:
        left = [n for n in range(8) if n not in expected]
        expected.append(min(left, key=lambda n: order.cost((*expected, n))))
    assert found == expected
    assert n_lazy < 36


def test_standard_errors_are_those_of_means_over_rows():
    nats = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tally = Tally()
    tally.add(torch.stack((nats * 10, nats, nats, torch.full_like(nats, 10.0)), dim=1))
    assert tally.cost.nats == pytest.approx(float(nats.mean()))
    assert tally.cost.standard_error == pytest.approx(float(nats.std() / 40**0.5))


@pytest.mark.parametrize("seed", range(3))
def test_differences_tell_more_than_few_rows(seed):
    """To a set that is known of more rows, and loses much the same: against many such texts."""
    draw = torch.Generator().manual_seed(seed)

    def columns(nats):
        return torch.stack((nats * 10, nats * 20, nats, torch.full_like(nats, 10.0)), dim=1)

    def both():
        nats = 1 + torch.randn(64, dtype=torch.float64, generator=draw)
        other = nats * 0.8 + 0.1 * torch.randn(64, dtype=torch.float64, generator=draw)
        few, many = Tally(), Tally()
        few.add(columns(other)[:8])
        many.add(columns(nats))
        return few, many

    drawn = [both() for _ in range(400)]
    costs = [few.cost_beside(many) for few, many in drawn]
    nats = torch.tensor([cost.nats for cost in costs])
    assert float(nats.mean()) == pytest.approx(0.8, abs=0.03)
    said = torch.tensor([cost.standard_error for cost in costs]).square().mean().sqrt()
    assert float(said) == pytest.approx(float(nats.std()), rel=0.15)
    assert (
        float(said) < float(torch.tensor([few.cost.standard_error for few, _ in drawn]).mean()) / 2
    )
    for cost in costs:
        assert cost.kl == pytest.approx(2 * cost.nats)
        assert cost.n_token == 80
    # Where the other one is not known better, or says nothing, a set stands for itself.
    few, many = drawn[0]
    assert few.cost_beside(many.first(8)) == few.cost_beside(None) == few.cost
    nothing = Tally()
    nothing.add(columns(torch.zeros(8, dtype=torch.float64)))
    assert nothing.cost_beside(many) == nothing.cost


@pytest.mark.slow
def test_the_page_shows_all_of_it(llama_result):
    from bov_lightning.report.content import plot_csv
    from bov_lightning.report.drawing import png
    from bov_lightning.report.page import html

    report = make_report([llama_result, replace(llama_result, name="<b>other</b>")])
    page = html(report)
    assert "&lt;b&gt;other&lt;/b&gt;" in page
    assert "<b>" not in page
    for plot in report.plots:
        assert f'id="{plot.slug}"' in page
    (heads, _) = (plot for plot in report.plots if plot.kind == "map")
    lines = plot_csv(heads).splitlines()
    assert lines[0] == "series,layer,head,explained"
    assert len(lines) == 1 + llama_result.n_layer * llama_result.n_head
    assert png(heads).startswith(b"\x89PNG")


@pytest.fixture
def llama_directory(workplace, tokenizer_directory):
    """A model as ``transformers`` writes it, and a text."""
    make_llama(num_hidden_layers=3).save_pretrained("llama")
    shutil.copytree(tokenizer_directory, "llama", dirs_exist_ok=True)
    return workplace / "llama"


def write_text(texts) -> None:
    with open("text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


SMALL = ["--data", "text.jsonl", "--tokens", "1500", "--held-out", "700", "--row-length", "24",
         "--own-rows", "0,64", "--precision", "0"]  # fmt: skip


@pytest.mark.slow
def test_the_command_gives_the_same(llama_directory, texts, llama_result, capsys):
    """As Python does, and a page, CSV and PNG from what is kept beside it."""
    write_text(texts)
    assert main(["probe", "llama", *SMALL, "--json", "--output", "page.html"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    expected = llama_result.as_dict()
    assert found.pop("name") == "llama"
    del expected["name"]
    assert found == json.loads(json.dumps(expected))
    again = ["--state", "page.html.state"]
    for kind, name in (("csv", "models.csv"), ("png", "cost_per_layer.png")):
        assert main(["probe", "llama", *SMALL, *again, "--output", kind, "--format", kind]) == 0
        assert (llama_directory.parent / kind / name).stat().st_size > 100
    out = capsys.readouterr().out
    assert "llama: LlamaForCausalLM of 3 layers, " in out


def break_weights(directory) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def remove_tokenizer(directory) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def other_model(**shape):
    def write(directory):
        make_llama(**shape).save_pretrained(directory)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "options", "line"),
    [
        (break_weights, [], "model.layers.1.self_attn.v_proj.weight holds 1 of "),
        (remove_tokenizer, [], "llama has no usable tokenizer"),
        (other_model(vocab_size=100), [], "the model's embedding has 100 rows: the tokenizer is"),
        (lambda d: tiny("bert", {"is_decoder": False}).save_pretrained(d), [],
         "so it is no causal language model"),
        (lambda d: tiny("mamba", {"state_size": 4}).save_pretrained(d), [],
         "MambaForCausalLM has no value projections"),
        (lambda d: None, ["--layers", "3"], "--layers holds 3"),
        (lambda d: None, ["--own-rows", "few"], "--own-rows few: give whole numbers"),
        (lambda d: None, ["--row-length", "1500"], "too few for a batch of 4 rows of 1500 tokens"),
        (lambda d: None, ["--data", "none.txt"], "no file matches none.txt"),
        (lambda d: None, ["--tokens", "0"], "--tokens is 0: at least 1"),
        (lambda d: None, ["--output", "llama"], "--output llama is a directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_one_line(spoil, options, line, llama_directory, texts, capsys):
    write_text(texts[:1])
    spoil(llama_directory)
    assert main(["probe", "llama", *SMALL, *options]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bov: ")]
    assert line in error


@pytest.mark.slow
def test_a_shared_projection_is_one_line(tokenizer, texts):
    model = make_llama()
    layers = model.model.layers
    layers[1].self_attn.v_proj = layers[0].self_attn.v_proj
    with pytest.raises(UserError, match="share one value projection"):
        bov_lightning.probe(model, tokenizer, texts, FEW)
