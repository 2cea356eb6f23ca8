"""Intervals against plain resampling; what tables must not be silent about."""

import numpy as np
import pytest
import torch
from evaluation_material import VOCAB_SIZE, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import make_model, perturb

from bov_lightning.checkpoint.writing import write_checkpoint
from bov_lightning.cli import main
from bov_lightning.model.config import ValueConfig
from evaluation import report
from evaluation.results import read_results


def test_bootstrap_agrees_with_resampling_row_by_row():
    generator = np.random.default_rng(1)
    tasks = [generator.choice([0.0, 1.0], 40), generator.choice([-0.25, 0.5, 1.0], 25)]
    interval = report.bootstrap(tasks)
    means = [
        np.mean([rows[generator.integers(0, len(rows), len(rows))].mean() for rows in tasks])
        for _ in range(3_000)
    ]
    low, high = np.percentile(means, report.LEVEL)
    assert interval.value == pytest.approx(np.mean([rows.mean() for rows in tasks]))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.015)
    assert interval.low < interval.value < interval.high
    assert 0 <= interval.p_positive <= 1


def fake_results(outcomes: list[float], **extra) -> dict:
    mean = float(np.mean(outcomes))
    centred = [(x - 0.25) / 0.75 for x in outcomes]
    return {
        "results": {
            "core_x": {"acc,none": mean, "acc_stderr,none": 0.1, "sample_len": len(outcomes),
                       "centered,none": float(np.mean(centred))},
            "core_paper": {"centered,none": float(np.mean(centred))},
        },
        "groups": {"core_paper": {"centered,none": float(np.mean(centred))}},
        "group_subtasks": {"core_paper": ["core_x"]},
        "n-shot": {"core_x": 10},
        "configs": {"core_x": {"metadata": {"baseline": {"v1": 0.25}}}},
        "samples": {"core_x": [{"doc_id": i, "acc": a, "centered": c}
                               for i, (a, c) in enumerate(zip(outcomes, centred, strict=True))]},
        "evaluation": {"cropped_prompts": {}, "rows_left_out": {}, "fewer_shots": {},
                       "max_length": 64, **extra},
    }  # fmt: skip


def test_tables_name_protocol_interval_and_everything_that_was_cut():
    text = report.table(fake_results(
        [1, 0, 1, 1], cropped_prompts={"core_x": 3}, rows_left_out={"core_x": 2},
        fewer_shots={"core_x": 3},
    ))  # fmt: skip
    assert "0.7500" in text
    assert "0.6667  [" in text
    assert "per byte, v1 baselines" in text
    assert "3 prompts exceed the context of 64 tokens" in text
    assert "the time limit left rows out (core_x 2)" in text
    assert "fewer shots than the protocol's" in text


@settings(max_examples=100, deadline=None)
@given(
    name=st.text("abc_", min_size=1, max_size=60),
    numbers=st.lists(st.floats(-1e300, 1e300, allow_nan=False), min_size=3, max_size=3),
    n_row=st.integers(0, 10**12),
)
def test_no_width_glues_two_columns_together(name, numbers, n_row):
    perplexity, error, accuracy = numbers
    results = fake_results([1, 0])
    results["results"] |= {
        name: {"word_perplexity,none": perplexity, "word_perplexity_stderr,none": error,
               "sample_len": n_row},
        f"{name}x": {"acc,none": accuracy, "acc_stderr,none": error, "sample_len": n_row,
                     "centered,none": accuracy},
    }  # fmt: skip
    results["configs"][f"{name}x"] = results["configs"]["core_x"]
    lines = {line.split()[0]: line.split() for line in report.table(results).splitlines()}
    end = [f"{perplexity:.4f}", f"{error:.4f}", "word_perplexity"]
    assert lines[name] == [name, "0", str(n_row), *end]
    end = [f"{accuracy:.4f}", f"{error:.4f}", "0.250", f"{accuracy:.4f}"]
    assert lines[f"{name}x"] == [f"{name}x", "0", str(n_row), *end]


def test_what_the_context_cut_off_and_how_the_model_was_computed_are_said():
    text = report.table(fake_results([1, 0], cut_answers={"core_x": 2}, notes=["as a whole"]))
    assert "note: 2 answers ended where the context of 64 tokens does" in text
    assert "note: as a whole" in text


def test_comparison_is_paired_by_row():
    draw = np.random.default_rng(0)
    base = draw.choice([0.0, 1.0], 200)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:8]] = 1
    text = report.compare(fake_results(list(better)), fake_results(list(base)), ("a", "b"))
    (line,) = [line for line in text.splitlines() if line.startswith("core_x")]
    # Unpaired, 8 of 200 rows would drown in the noise of both; paired, they never lose.
    assert "+0.0400  [+0.0" in line
    assert line.endswith("1.000")
    assert report.NOISE in text
    same = report.compare(fake_results([1, 0]), fake_results([1, 0]), ("a", "a"))
    assert "+0.0000  [+0.0000, +0.0000]" in same


@pytest.fixture
def model_directories(tmp_path, tokenizer):
    """A checkpoint of ours and a Hugging Face directory."""
    value = ValueConfig("bank", "last_third", "learned")
    model = perturb(make_model(value, vocab_size=VOCAB_SIZE), smear=0.5)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    from dataclasses import asdict

    import yaml

    config = yaml.safe_dump({"model": {"config": asdict(model.config)}})
    write_checkpoint(tmp_path / "ours", 7, model.state_dict(), config, tokenizer=folder)
    make_llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "ours", tmp_path / "llama"


@pytest.mark.slow
def test_command_evaluates_compares_and_writes(model_directories, tasks_folder, tmp_path, capsys):
    ours, llama = map(str, model_directories)
    data = ["--data-dir", str(tasks_folder), "--include-path", str(tasks_folder)]
    tasks = ["--tasks", "tiny_choice,tiny_schema", "tiny_lm"]
    output = ["--output", str(tmp_path / "out")]
    assert main(["evaluate", ours, *tasks, *data, *output, "--compare", llama]) == 0
    out = capsys.readouterr().out
    assert out.count("tiny_choice") == 3
    assert f"{ours} minus {llama}, paired by row" in out
    (results,) = read_results(tmp_path / "out")
    assert results["evaluation"]["step"] == 7
    assert len(list((tmp_path / "out").glob("samples_*.jsonl"))) == 3
    assert main(["evaluate", llama, "--tasks", "tiny_lm", *data, "--max-per-task", "3"]) == 0
    assert "tiny_lm                               2      3" in capsys.readouterr().out


def test_command_mistakes(model_directories, tasks_folder, tmp_path, capsys):
    ours, llama = model_directories
    data = ["--data-dir", str(tasks_folder), "--include-path", str(tasks_folder)]
    tiny = ["--tasks", "tiny_choice", *data]
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    for arguments, message in (
        (["nowhere", *tiny], "nowhere does not exist"),
        ([str(ours), "--tasks", "core_arceasy"], "did you mean core_arc_easy"),
        ([str(ours), *tiny, "--max-per-task", "0"], "--max-per-task is 0"),
        ([str(ours), *tiny, "--device", "cuda"], "no usable GPU"),
        ([str(llama), *tiny], "has no usable tokenizer"),
        ([str(ours), "--tasks", "tiny_choice", "--include-path", "gone"], "is no folder"),
        ([str(ours), *tiny, "--compare", "gone"], "gone does not exist"),
        ([str(ours), "--tasks", "heldout"], "has no data section"),
    ):
        if arguments[-1] == "cuda" and torch.cuda.is_available():
            continue
        assert main(["evaluate", *arguments]) == 2, arguments
        err = capsys.readouterr().err.strip()
        assert message in err
        assert "\n" not in err


FOREIGN = """\
task: foreign_{name}
custom_dataset: !function foreign.dataset
output_type: {kind}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""


@pytest.mark.slow
def test_other_tasks_of_lm_eval_run_by_name(model_directories, tmp_path, capsys):
    """The three kinds of requests, through lm-eval's own task class."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "foreign.py").write_text(
        "from datasets import Dataset\n"
        "ROWS = [{'q': f'the parser {i}', 'c': ['an option', 'help'], 'g': i % 2}\n"
        "        for i in range(12)]\n"
        "def dataset(**kwargs):\n"
        "    return {'test': Dataset.from_list(ROWS)}\n"
    )
    choices = "doc_to_choice: '{{c}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
    until = (
        "generation_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]"
    )
    for name, kind, text, target, more in (
        ("choice", "multiple_choice", "{{q}}:", "{{g}}", choices),
        ("generation", "generate_until", "{{q}}:", "{{c[g]}}", until),
        ("rolling", "loglikelihood_rolling", "", "{{q}}", "metric_list: [{metric: bits_per_byte}]"),
    ):
        (folder / f"{name}.yaml").write_text(
            FOREIGN.format(name=name, kind=kind, text=text, target=target, more=more)
        )
    names = ["foreign_choice", "foreign_generation", "foreign_rolling"]
    options = [
        "--include-path",
        str(folder),
        "--max-per-task",
        "8",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["evaluate", str(model_directories[0]), "--tasks", *names, *options]) == 0
    (results,) = read_results(tmp_path / "o")
    assert {results["results"][name]["sample_len"] for name in names} == {8}
    assert results["results"]["foreign_rolling"]["bits_per_byte,none"] > 0
    assert "acc_norm" in capsys.readouterr().out
