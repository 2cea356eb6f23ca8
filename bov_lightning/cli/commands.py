"""The commands: each reads its options, and imports what it needs when it runs."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bov_lightning.cli.options import (
    Parser,
    add_options,
    number,
    parse_with_keys,
    path,
    path_text,
    read_given,
    read_options,
    recipe_parser,
)
from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, SEED, Range

if TYPE_CHECKING:
    from bov_lightning.model.config import TransformerConfig


def _fit(arguments: list[str]) -> None:
    parser = recipe_parser("fit", "Trains a recipe; continues its run if there is one.")
    parser.add_argument("--keys", action="store_true", help="list all keys of a recipe and exit")
    known, options = parse_with_keys(parser, arguments)
    if known.keys:
        _print_keys()
        return
    given = read_given(known, options)
    from bov_lightning.training.fit import fit

    fit(given)


def _print_keys() -> None:
    import shutil

    from bov_lightning.recipe.explained import listing

    print(listing(shutil.get_terminal_size().columns))


def _validate(arguments: list[str]) -> None:
    parser = recipe_parser("validate", "Prints val_bpb on the held-out text of the run's data.")
    parser.add_argument(
        "checkpoint", type=path_text, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    known, options = parse_with_keys(parser, arguments)
    from bov_lightning.checkpoint.directory import CONFIG, find_checkpoint
    from bov_lightning.recipe.given import read_stored

    checkpoint = find_checkpoint(known.checkpoint)
    given = read_stored(
        checkpoint / CONFIG, known.config, options, data=known.data, val_data=known.val_data
    )
    from bov_lightning.training.fit import validate

    validate(checkpoint, given)


def _prepare(arguments: list[str]) -> None:
    parser = recipe_parser("prepare", "Makes a recipe's tokenizer and packed token shards.")
    number(
        parser, "--processes", int, COUNT, help="how many pack at once; one per core if not given"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="machine I of N, from 0")
    known, options = parse_with_keys(parser, arguments)
    index, _, total = known.shard.partition("/")
    if not (re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", known.shard) and int(index) < int(total)):
        raise UserError(f"--shard {known.shard}: give I/N with I from 0 to N-1, such as 0/4")
    given = read_given(known, options)
    from bov_lightning.recipe.data_module import build_data

    corpus = build_data(given).corpus
    before = corpus.is_prepared()
    corpus.prepare(known.processes, (int(index), int(total)))
    if not corpus.is_prepared():
        print(f"{corpus.directory}: the other --shard parts are missing")
    elif before:
        print(f"{corpus.directory} holds everything already")


def _plan(arguments: list[str]) -> None:
    parser = recipe_parser("plan", "Prints what a recipe costs; trains and allocates nothing.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    number(
        parser, "--devices", int, COUNT,
        help="devices of the run; trainer.devices x num_nodes if not given",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="80GB",
        help="of a device: a plan that needs more fails; that of this machine's GPUs if not given",
    )  # fmt: skip
    parser.add_argument("--inference", action="store_true", help="what decoding costs instead")
    number(parser, "--batch", int, COUNT, default=1, help="rows decoded together")
    number(parser, "--context", int, COUNT, help="tokens per row; 10 x sequence_len")
    parser.add_argument(
        "--engine", choices=["bov", "vllm"], default="bov",
        help="with --inference: vllm counts the pages that it makes of --memory",
    )  # fmt: skip
    number(
        parser, "--block-size", int, COUNT, default=16,
        help="with vllm: tokens of a block; 16 if not given, as on GPUs; CPUs have 128",
    )  # fmt: skip
    number(
        parser, "--batched-tokens", int, COUNT, default=2048,
        help="with vllm: new tokens of a step, which windows keep beside their own; "
        "2048 if not given",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="with vllm: of pages"
    )
    number(
        parser, "--bandwidth", float, Range(above=0), default=3350.0,
        help="memory's GB/s (an H100's if not given)",
    )  # fmt: skip
    parser.add_argument("--plot", type=path, help="also draw caches against context, to a file")
    known, options = parse_with_keys(parser, arguments)
    if known.engine == "vllm" and not known.inference:
        raise UserError("--engine vllm counts what decoding costs: add --inference")
    given = read_given(known, options)
    if known.inference:
        if known.engine == "vllm":
            _plan_pages(known, given.recipe.model.config)
            return
        from bov_lightning.planning.decoding import print_inference_plan

        config = given.recipe.model.config
        context = known.context or config.max_context
        print_inference_plan(config, known.batch, context, known.bandwidth, known.json, known.plot)
        return
    from bov_lightning.planning.plan import print_plan

    print_plan(given, known.devices, known.memory, as_json=known.json)


def _plan_pages(known: argparse.Namespace, config: "TransformerConfig") -> None:
    from bov_lightning.planning.devices import device_memory, parse_bytes
    from bov_lightning.planning.serving import print_serving_plan

    memory = device_memory() if known.memory is None else parse_bytes(known.memory)
    if memory is None:
        raise UserError("--engine vllm counts pages: give their --memory, such as 4GB")
    print_serving_plan(
        config, memory, known.context or config.max_context, known.block_size,
        known.batched_tokens, known.dtype, known.json,
    )  # fmt: skip


def _submit(arguments: list[str]) -> None:
    from bov_lightning.launch.submit import JobConfig, submit

    parser = recipe_parser("submit", "Trains a recipe as a SLURM job that requeues itself.")
    add_options(parser.add_argument_group("the job"), JobConfig)
    parser.add_argument(
        "--evaluate", action="store_true",
        help="a job beside the run that evaluates its checkpoints as they appear, instead",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file and stop")
    known, options = parse_with_keys(parser, arguments)
    given = read_given(known, options)
    submit(given, read_options(known, JobConfig), known.evaluate, known.dry_run)


def _sweep(arguments: list[str]) -> None:
    from bov_lightning.launch.submit import JobConfig

    parser = recipe_parser(
        "sweep", "Trains a recipe with several value sources and seeds at equal FLOPs, and reports."
    )
    parser.add_argument(
        "--values", metavar="NAME,...",
        help="value overlays: names such as standard,bov (see bov recipes), or YAML files; "
        "the first is the baseline",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0", metavar="N,...", help="0 if not given")
    number(parser, "--jobs", int, COUNT, default=1, help="runs that go on at the same time")
    parser.add_argument(
        "--output", type=path, help="the report; ROOT/NAME-report.html if not given"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--slurm", action="store_true", help="submit each run as a job")
    _add_ladder_options(parser.add_argument_group("a ladder of sizes, instead of --values"))
    add_options(parser.add_argument_group("the job"), JobConfig)
    known, options = parse_with_keys(parser, arguments)
    if known.ladder is not None:
        _sweep_ladder(known, options, arguments)
        return
    if known.values is None:
        raise UserError("bov sweep: give --values standard,bov,... or --ladder L.yaml")
    seeds = known.seeds.split(",")
    if not all(re.fullmatch("[0-9]{1,20}", seed.strip()) for seed in seeds):
        raise UserError(f"--seeds {known.seeds}: give whole numbers, such as 0,1,2")
    for seed in map(int, seeds):
        if wrong := SEED.refusal(seed):
            raise UserError(f"--seeds: {seed} {wrong}")
    from bov_lightning.launch.sweep import sweep
    from bov_lightning.launch.sweep_rows import make_rows

    values = [name.strip() for name in known.values.split(",")]
    text = {"data": known.data, "val_data": known.val_data}
    rows = make_rows(values, [int(seed) for seed in seeds], known.config, options, text)
    job = read_options(known, JobConfig) if known.slurm else None
    sweep(rows, known.output, n_job=known.jobs, slurm_job=job, dry_run=known.dry_run)


def _add_ladder_options(parser: Any) -> None:
    parser.add_argument(
        "--ladder", type=path, metavar="L.yaml",
        help="rungs, arms, tuning and rules for a verdict; --output is then the folder of results, "
        "that of the file if not given",
    )  # fmt: skip
    parser.add_argument(
        "--rungs", metavar="NAME,...", help="those to run; all that are not optional if not given"
    )
    parser.add_argument("--stop-at", metavar="HH:MM", help="when runs save and no other one begins")
    number(
        parser, "--time-limit", float, Range(above=0, most=10**8), metavar="S",
        help="the same in seconds from now",
    )  # fmt: skip
    number(
        parser, "--flops-per-second", float, Range(above=0, most=10**20), metavar="X",
        help="for the plan's hours; measured if not given",
    )  # fmt: skip
    parser.add_argument(
        "--speed", action="store_true", help="measure the arms' speeds on a CPU, and stop"
    )
    parser.add_argument(
        "--report", action="store_true", help="only make the report of the results that are there"
    )
    parser.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)


def _sweep_ladder(known: argparse.Namespace, options: list[str], arguments: list[str]) -> None:
    from bov_lightning.launch.ladder import LadderRuns
    from bov_lightning.launch.ladder_sweep import LadderOptions, deadline_of, sweep_ladder
    from bov_lightning.launch.submit import JobConfig
    from bov_lightning.recipe.ladder import read_ladder

    for name in ("values", "config"):
        if getattr(known, name):
            raise UserError(f"--{name} and --ladder: the ladder's file says what is trained")
    ladder, output = read_ladder(known.ladder), known.output or known.ladder.parent
    if output.is_file():
        raise UserError(f"--output {output} is a file: --ladder writes a folder")
    rungs = [name.strip() for name in known.rungs.split(",")] if known.rungs else None
    runs = LadderRuns(ladder, options, {"data": known.data, "val_data": known.val_data}, rungs)
    how = LadderOptions(
        output, known.jobs, deadline_of(known.stop_at, known.time_limit), known.flops_per_second,
        known.dry_run, known.speed, known.report, known.as_worker,
        read_options(known, JobConfig) if known.slurm else None,
    )  # fmt: skip
    sweep_ladder(runs, how, arguments)


def _evaluate(arguments: list[str]) -> None:
    parser = Parser(prog="bov evaluate", description="Runs benchmarks on a model.")
    parser.add_argument(
        "checkpoint", type=path_text, help="a run directory (its newest checkpoint), a "
        "checkpoint, or a Hugging Face directory",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=["core_paper"], metavar="TASK",
        help="core_paper (default), core_dclm_v1, core_dclm_v2, heldout, single tasks such as "
        "core_arc_easy, or any of lm-eval's names",
    )  # fmt: skip
    number(
        parser, "--max-per-task", int, COUNT, metavar="N", help="rows per task; all if not given"
    )
    parser.add_argument(
        "--data-dir",
        type=path_text,
        metavar="D",
        help="where the CORE files lie; BOV_EVAL_DATA if not given",
    )
    parser.add_argument("--download", action="store_true", help="fetch CORE files that are missing")
    parser.add_argument(
        "--output", type=path_text, metavar="D", help="write results and samples there"
    )
    parser.add_argument(
        "--compare", type=path_text, metavar="OTHER", help="evaluate this one too, and compare rows"
    )
    parser.add_argument(
        "--watch", action="store_true", help="evaluate every checkpoint of a run as it appears"
    )
    number(
        parser, "--poll-seconds", float, Range(above=0, most=10**6), default=10.0,
        help="with --watch: between two looks",
    )  # fmt: skip
    parser.add_argument(
        "--include-path", type=path_text, metavar="D", help="a folder of further lm-eval tasks"
    )
    number(parser, "--time-limit", float, Range(above=0), metavar="S", help="seconds per task")
    number(
        parser, "--tokens-per-forward", int, COUNT,
        help="2048 on a CPU, 8192 on a GPU if not given",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    known = parser.parse_args(arguments)
    from evaluation.command import evaluate_command

    evaluate_command(**vars(known))


def _probe(arguments: list[str]) -> None:
    from bov_lightning.value_probe.settings import ProbeSettings

    parser = Parser(
        prog="bov probe",
        description="Tells what a model loses if its values become tables by token id, layer by "
        "layer. Trains nothing.",
    )
    parser.add_argument(
        "models", nargs="+", type=path_text, metavar="MODEL", help="a run directory (its newest "
        "checkpoint), a checkpoint, or a Hugging Face directory",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILES",
        help="text files: a path or a pattern; again for several",
    )  # fmt: skip
    add_options(parser, ProbeSettings)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=path, help="file to write as well; for csv and png a directory"
    )
    parser.add_argument("--format", choices=["html", "md", "csv", "png"], default="html")
    parser.add_argument(
        "--state", type=path, metavar="D",
        help="where what is found is kept, so that a probe that is killed goes on; OUTPUT.state "
        "if not given",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    known = parser.parse_args(arguments)
    from bov_lightning.value_probe.command import probe_command

    probe_command(
        known.models, known.data, read_options(known, ProbeSettings), output=known.output,
        format=known.format, as_json=known.json, device=known.device, dtype=known.dtype,
        state=known.state,
    )  # fmt: skip


def _report(arguments: list[str]) -> None:
    parser = Parser(prog="bov report", description="Compares runs: curves, tables, figures.")
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="run directories, or folders of them"
    )
    parser.add_argument(
        "--output", type=path, default=Path("report.html"),
        help="file to write; for csv and png a directory",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=["html", "md", "csv", "png"], default="html",
        help="html: one page that needs no network",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="NAME",
        help="what differences are taken to: a run, or a row such as standard; the first run if "
        "not given",
    )  # fmt: skip
    known = parser.parse_args(arguments)
    from bov_lightning.report import write_report

    print(write_report(known.runs, known.output, known.format, known.baseline))


def _generate(arguments: list[str]) -> None:
    from bov_lightning.inference.sampling import Sampling

    parser = Parser(prog="bov generate", description="Samples text from a checkpoint.")
    parser.add_argument(
        "checkpoint", type=path_text, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; again for several"
    ).may_be_empty = True
    parser.add_argument(
        "--prompt-file", type=path_text, metavar="F", help="a file whose text is a prompt; - stdin"
    )
    parser.add_argument(
        "--prompts", type=path_text, metavar="F",
        help='one prompt per line, or per line {"prompt": "..."}; - reads stdin',
    )  # fmt: skip
    add_options(parser, Sampling)
    number(parser, "--batch-size", int, COUNT, default=8, help="prompts continued together")
    number(
        parser, "--max-context", int, COUNT,
        help="tokens of prompt and continuation at most; 10 x sequence_len if not given",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--bank-device", choices=["cpu", "mmap"],
        help="keep value tables in the host's memory or in the file",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    known = parser.parse_args(arguments)
    from bov_lightning.inference.generate import generate, read_prompts

    generate(
        known.checkpoint, read_prompts(known.prompt, known.prompt_file, known.prompts),
        read_options(known, Sampling), batch_size=known.batch_size,
        max_context=known.max_context, device=known.device, dtype=known.dtype,
        as_json=known.json, bank_device=known.bank_device,
    )  # fmt: skip


def _serve(arguments: list[str]) -> None:
    parser = Parser(
        prog="bov serve",
        description="Serves a model with vLLM, behind an API like OpenAI's.",
        epilog="What stands after -- goes to vLLM's server as it is.",
    )
    parser.add_argument(
        "checkpoint", type=path_text, help="a run directory (its newest checkpoint), a checkpoint "
        "or an export",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for every one of this "
        "machine's",
    )  # fmt: skip
    number(parser, "--port", int, Range(1, 65_535), default=8000, help="port to listen at")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"],
        help="of weights and pages; an export's own, else float32",
    )  # fmt: skip
    number(
        parser, "--max-model-len", int, COUNT,
        help="tokens of prompt and answer at most; 10 x sequence_len if not given",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="4GB", help="of the pages; what vLLM takes if not given"
    )
    parser.add_argument(
        "--values", choices=["stored", "keys"],
        help="what the pages of bank layers hold: keys and values, or keys alone",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=path, metavar="D",
        help="where the export goes; export-STEP-DTYPE beside the run's checkpoints if not given",
    )  # fmt: skip
    parser.add_argument(
        "--python", type=path, metavar="P",
        help="the Python that has vLLM; that of .venv-serving, or this one, if not given",
    )  # fmt: skip
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    known = vars(parser.parse_args(arguments[:cut]))
    from bov_lightning.inference.serving import ServeConfig, serve
    from bov_lightning.planning.devices import parse_bytes

    if known["memory"] is not None:
        known["memory"] = parse_bytes(known["memory"])
    checkpoint = known.pop("checkpoint")
    serve(checkpoint, ServeConfig(**known, more=tuple(arguments[cut + 1 :])))


def _export(arguments: list[str]) -> None:
    parser = Parser(
        prog="bov export", description="Writes a checkpoint as a Hugging Face directory."
    )
    parser.add_argument(
        "checkpoint", type=path_text, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--output", type=path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    known = parser.parse_args(arguments)
    import torch

    from bov_lightning.interop.hf_export import export

    difference = export(known.checkpoint, known.output, getattr(torch, known.dtype))
    print(f"{known.output}: logits equal the checkpoint's within {difference:.1g}")


def _import(arguments: list[str]) -> None:
    parser = Parser(prog="bov import", description="Turns another code's checkpoint into ours.")
    parser.add_argument(
        "kind", choices=["nanochat", "hf"], help="the paper's authors' code, or a bov export"
    )
    parser.add_argument(
        "directory", type=path, help="model_NNNNNN.pt and meta_NNNNNN.json, or an export"
    )
    parser.add_argument("--output", type=path, required=True, help="directory to write")
    known = parser.parse_args(arguments)
    if known.kind == "hf":
        from bov_lightning.interop.hf_import import import_hf as read
    else:
        from bov_lightning.interop.nanochat import import_nanochat as read

    config = read(known.directory, known.output)
    print(f"{known.output}: {config.n_layer} layers, d_model {config.d_model}, {config.value}")


def _recipes(arguments: list[str]) -> None:
    Parser(prog="bov recipes", description="Lists the recipes of the package.").parse_args(
        arguments
    )
    from bov_lightning.recipe.overlays import packaged_recipes

    folder = packaged_recipes()
    for file in sorted(folder.rglob("*.yaml")):
        print(file.relative_to(folder).with_suffix(""))


COMMANDS = {
    "fit": _fit,
    "prepare": _prepare,
    "validate": _validate,
    "plan": _plan,
    "submit": _submit,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "probe": _probe,
    "report": _report,
    "generate": _generate,
    "serve": _serve,
    "export": _export,
    "import": _import,
    "recipes": _recipes,
}
