"""The `bov` command. Imports what a command needs only when that command runs."""

import argparse
import errno
import os
import sys
from pathlib import Path

USAGE = """\
usage: bov COMMAND ...

  fit        train a recipe, or continue its run       bov fit --config recipes/quickstart.yaml
  prepare    tokenize and pack a recipe's text         bov prepare --config R.yaml
  validate   measure bits per byte                     bov validate RUN-or-CHECKPOINT
  plan       parameters, FLOPs, memory, before paying  bov plan --config R.yaml [--inference]
  submit     train on a SLURM cluster                  bov submit --config R.yaml --nodes N ...
  sweep      compare value sources at equal FLOPs      bov sweep --config R.yaml --values ...
  evaluate   benchmarks: CORE, or any of lm-eval's    bov evaluate RUN-or-CHECKPOINT --data-dir D
  report     curves and tables of runs, as a page      bov report RUN ... --output report.html
  generate   sample text                               bov generate RUN-or-CHECKPOINT --prompt P
  export     write a Hugging Face directory            bov export RUN-or-CHECKPOINT --output D
  import     read the paper's authors' checkpoints     bov import nanochat DIR --output D
  recipes    list the recipes that come with bov

Recipes are YAML files; several --config overlay each other, and --key.of.recipe VALUE overrides
both. bov COMMAND --help says more.
"""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError`, in one line."""

    def error(self, message: str):
        from bov_lightning.errors import UserError

        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def _recipe_parser(command: str, description: str) -> _Parser:
    parser = _Parser(
        prog=f"bov {command}",
        description=description,
        epilog="Every key of the recipe is an option too, for example --run.name NAME. "
        "bov fit --keys lists them all with their meaning.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="R.yaml",
        help="a recipe, or an overlay on the ones before it",
    )  # fmt: skip
    for name, purpose in (("--data", "train"), ("--val-data", "validate")):
        parser.add_argument(
            name, action="append", default=[], metavar="FILES",
            help=f"text files to {purpose} on, instead of the recipe's: a path or a pattern",
        )  # fmt: skip
    return parser


def _read_recipe(known: argparse.Namespace, options: list[str], base: dict | None = None):
    """(typed recipe, the same as plain data, its name for messages)."""
    from bov_lightning.errors import UserError
    from bov_lightning.recipe import sections as recipe

    paths = known.config
    if not paths and base is None:
        raise UserError("give a recipe: --config recipes/quickstart.yaml")
    overlays = [(path := recipe.find_recipe(name), recipe.read_yaml(path)) for name in paths]
    settings = dict(base or {})
    # `--data {class_path: ...}` is the recipe's key.
    whole = [option for option in known.data if option.lstrip().startswith("{")]
    files = [option for option in known.data if option not in whole]
    options = [x for option in whole for x in ("--data", option)] + options
    text = recipe.text_overlay(files, known.val_data)
    for origin, overlay in (
        *overlays, ("--data", text), ("command line", recipe.parse_options(options)),
    ):  # fmt: skip
        recipe.check_keys(overlay, str(origin))
        recipe.import_source(overlay, str(origin))
        settings = recipe.merge(settings, overlay)
    origin = paths[-1] if paths else "recipe"
    if overlays and not (settings.get("run") or {}).get("name"):
        name = recipe.default_run_name(overlays)
        settings = recipe.merge(settings, {"run": {"name": name}})
    settings = recipe.fill_vocab_size(settings)
    return recipe.build(recipe.Recipe, settings, origin), settings, origin


def _fit(arguments: list[str]) -> None:
    parser = _recipe_parser("fit", "Trains a recipe; continues its run if there is one.")
    parser.add_argument("--keys", action="store_true", help="list all keys of a recipe and exit")
    known, options = parser.parse_known_args(arguments)
    if known.keys:
        _print_keys()
        return
    recipe, settings, origin = _read_recipe(known, options)
    from bov_lightning.training.fit import fit

    fit(recipe, settings, origin)


def _print_keys() -> None:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from bov_lightning.recipe.sections import Recipe

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="bov fit", usage="bov fit --config R.yaml [--key VALUE ...]")
    parser.add_class_arguments(Recipe)
    parser.print_help()


def _validate(arguments: list[str]) -> None:
    parser = _recipe_parser("validate", "Prints val_bpb on the held-out text of the run's data.")
    parser.add_argument(
        "checkpoint", help="a run directory (its newest checkpoint) or a checkpoint"
    )
    known, options = parser.parse_known_args(arguments)
    from bov_lightning.checkpoint.directory import CONFIG, find_checkpoint
    from bov_lightning.recipe.sections import check_keys, read_yaml

    checkpoint = find_checkpoint(known.checkpoint)
    stored = read_yaml(checkpoint / CONFIG)
    check_keys(stored, str(checkpoint / CONFIG))
    _check_stored_classes(stored, checkpoint / CONFIG)
    recipe, settings, origin = _read_recipe(known, options, base=stored)
    from bov_lightning.training.fit import validate

    validate(checkpoint, recipe, settings, origin if known.config else str(checkpoint / CONFIG))


def _check_stored_classes(stored: dict, path: Path) -> None:
    """A checkpoint may come from a stranger: it names no classes but this project's."""
    from bov_lightning.errors import UserError

    stored["trainer"] = {k: v for k, v in (stored.get("trainer") or {}).items() if k in _HARMLESS}
    pending = [stored.get("data") or {}]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            name = value.get("class_path", "data_modules.")
            if not str(name).startswith("data_modules."):
                raise UserError(
                    f"{path} names the class {name}: to trust it, give its data section in a "
                    "--config of your own and remove it there"
                )
            pending += value.values()
        elif isinstance(value, list):
            pending += value


_HARMLESS = ("accelerator", "devices", "precision")


def _prepare(arguments: list[str]) -> None:
    from bov_lightning.errors import UserError

    parser = _recipe_parser("prepare", "Makes a recipe's tokenizer and packed token shards.")
    parser.add_argument(
        "--processes", type=int, help="how many pack at once; one per core if not given"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="machine I of N, from 0")
    known, options = parser.parse_known_args(arguments)
    index, _, total = known.shard.partition("/")
    if not (index.isdigit() and total.isdigit() and int(index) < int(total)):
        raise UserError(f"--shard {known.shard}: give I/N with I from 0 to N-1, such as 0/4")
    if known.processes is not None and known.processes < 1:
        raise UserError(f"--processes is {known.processes}: at least 1")
    recipe, _, origin = _read_recipe(known, options)
    from bov_lightning.training.fit import prepare

    prepare(recipe, origin, known.processes, (int(index), int(total)))


def _plan(arguments: list[str]) -> None:
    parser = _recipe_parser("plan", "Prints what a recipe costs; trains and allocates nothing.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--devices", type=int, help="devices of the run; trainer.devices x num_nodes if not given"
    )
    parser.add_argument(
        "--memory", metavar="80GB",
        help="of a device: a plan that needs more fails; that of this machine's GPUs if not given",
    )  # fmt: skip
    parser.add_argument("--inference", action="store_true", help="what decoding costs instead")
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--context", type=int, help="tokens per row; 10 x sequence_len")
    parser.add_argument(
        "--bandwidth", type=float, default=3350, help="memory's GB/s (an H100's if not given)"
    )
    parser.add_argument("--plot", type=Path, help="also draw caches against context, to a file")
    known, options = parser.parse_known_args(arguments)
    recipe, _, origin = _read_recipe(known, options)
    if known.inference:
        from bov_lightning.planning.decoding import print_inference_plan

        context = known.context or recipe.model.config.max_context
        print_inference_plan(recipe, known.batch, context, known.bandwidth, known.json, known.plot)
        return
    from bov_lightning.planning.plan import print_plan

    print_plan(recipe, origin, known.devices, known.memory, as_json=known.json)


def _add_job(parser: argparse.ArgumentParser) -> None:
    """What SLURM is asked for, as options; see `submit.JobConfig`."""
    group = parser.add_argument_group("the job")
    group.add_argument("--nodes", type=int, default=1, help="nodes of the job")
    group.add_argument("--gpus-per-node", type=int, default=0, help="one process for each")
    group.add_argument("--tasks-per-node", type=int, help="processes per node; default: its GPUs")
    group.add_argument("--cpus-per-task", type=int, help="cores of each process")
    group.add_argument("--time", help="limit of one attempt, such as 12:00:00")
    group.add_argument(
        "--save-before-s", type=int, default=300,
        help="seconds before the limit at which the job saves and requeues itself",
    )  # fmt: skip
    group.add_argument("--partition", help="partition to run in")
    group.add_argument("--account", help="account to charge")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="another option of sbatch, such as --sbatch=--constraint=h100",
    )  # fmt: skip
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE",
        help="a shell line to run first, such as 'module load cuda'",
    )  # fmt: skip


def _job(known: argparse.Namespace):
    from dataclasses import fields

    from bov_lightning.launch.submit import JobConfig

    return JobConfig(**{f.name: getattr(known, f.name) for f in fields(JobConfig)})


def _submit(arguments: list[str]) -> None:
    parser = _recipe_parser("submit", "Trains a recipe as a SLURM job that requeues itself.")
    _add_job(parser)
    parser.add_argument(
        "--evaluate", action="store_true",
        help="a job beside the run that evaluates its checkpoints as they appear, instead",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file and stop")
    known, options = parser.parse_known_args(arguments)
    recipe, settings, origin = _read_recipe(known, options)
    from bov_lightning.launch.submit import submit

    submit(recipe, settings, origin, _job(known), known.evaluate, known.dry_run)


def _sweep(arguments: list[str]) -> None:
    from bov_lightning.errors import UserError

    parser = _recipe_parser(
        "sweep", "Trains a recipe with several value sources and seeds at equal FLOPs, and reports."
    )
    parser.add_argument(
        "--values", required=True, metavar="NAME,...",
        help="value overlays: names such as standard,bov (see bov recipes), or YAML files; "
        "the first is the baseline",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0", metavar="N,...", help="0 if not given")
    parser.add_argument("--jobs", type=int, default=1, help="runs that go on at the same time")
    parser.add_argument(
        "--output", type=Path, help="the report; ROOT/NAME-report.html if not given"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--slurm", action="store_true", help="submit each run as a job")
    _add_job(parser)
    known, options = parser.parse_known_args(arguments)
    seeds = known.seeds.split(",")
    if not all(seed.strip().isdigit() for seed in seeds):
        raise UserError(f"--seeds {known.seeds}: give whole numbers, such as 0,1,2")
    if known.jobs < 1:
        raise UserError(f"--jobs is {known.jobs}: at least 1")
    from bov_lightning.launch.sweep import sweep

    values = [name.strip() for name in known.values.split(",")]
    sweep(
        _rows(known, options, values, [int(seed) for seed in seeds]), known.output,
        n_job=known.jobs, slurm_job=_job(known) if known.slurm else None, dry_run=known.dry_run,
    )  # fmt: skip


def _rows(known: argparse.Namespace, options: list[str], values: list[str], seeds: list[int]):
    """The runs of a sweep, seed by seed, so that all rows of one seed are there early."""
    from bov_lightning.errors import UserError
    from bov_lightning.launch.sweep import Row
    from bov_lightning.recipe.budget import make_plan
    from bov_lightning.recipe.sections import find_recipe

    base, _, origin = _read_recipe(known, options)
    if base.model.budget is None:
        raise UserError(f"{origin}: model.budget is not set: give flops, tokens or steps")
    paths = [find_recipe(v if v.endswith((".yaml", ".yml")) else f"values/{v}") for v in values]
    names = [path.stem for path in paths]
    for kind, given in (("--values", names), ("--seeds", seeds)):
        if len(set(given)) < len(given):
            raise UserError(f"{kind}: {max(given, key=given.count)} is given twice")
    text = [x for option in ("data", "val_data") for files in getattr(known, option)
            for x in (f"--{option.replace('_', '-')}", files)]  # fmt: skip

    def row(name: str, path: Path, seed: int, flops: float | None) -> Row:
        own = argparse.Namespace(**{**vars(known), "config": [*known.config, str(path)]})
        extra = ["--seed", str(seed), "--run.name", f"{base.run.name}-{name}-seed{seed}"]
        extra += [] if flops is None else ["--model.budget.flops", repr(flops)]
        recipe, settings, _ = _read_recipe(own, options + extra)
        plan = make_plan(recipe.model.config, recipe.model.budget, recipe.batch.tokens)
        configs = [x for file in own.config for x in ("--config", file)]
        arguments = [*configs, *text, *options, *extra]
        return Row(name, seed, recipe, settings, arguments, plan)

    # What the first row's tokens or steps cost is what every row may cost.
    flops = base.model.budget.flops or row(names[0], paths[0], seeds[0], None).plan["flops"]
    return [row(*value, s, flops) for s in seeds for value in zip(names, paths, strict=True)]


def _evaluate(arguments: list[str]) -> None:
    parser = _Parser(prog="bov evaluate", description="Runs benchmarks on a model.")
    parser.add_argument(
        "checkpoint", help="a run directory (its newest checkpoint), a checkpoint, or a Hugging "
        "Face directory",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=["core_paper"], metavar="TASK",
        help="core_paper (default), core_dclm_v1, core_dclm_v2, heldout, single tasks such as "
        "core_arc_easy, or any of lm-eval's names",
    )  # fmt: skip
    parser.add_argument(
        "--max-per-task", type=int, metavar="N", help="rows per task; all if not given"
    )
    parser.add_argument(
        "--data-dir", metavar="D", help="where the CORE files lie; BOV_EVAL_DATA if not given"
    )
    parser.add_argument("--download", action="store_true", help="fetch CORE files that are missing")
    parser.add_argument("--output", metavar="D", help="write results and samples there")
    parser.add_argument(
        "--compare", metavar="OTHER", help="evaluate this one too, and compare rows"
    )
    parser.add_argument(
        "--watch", action="store_true", help="evaluate every checkpoint of a run as it appears"
    )
    parser.add_argument(
        "--poll-seconds", type=float, default=10.0, help="with --watch: between two looks"
    )
    parser.add_argument("--include-path", metavar="D", help="a folder of further lm-eval tasks")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds per task")
    parser.add_argument(
        "--tokens-per-forward", type=int, help="2048 on a CPU, 8192 on a GPU if not given"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    known = parser.parse_args(arguments)
    from evaluation.command import evaluate_command

    evaluate_command(**vars(known))


def _report(arguments: list[str]) -> None:
    parser = _Parser(prog="bov report", description="Compares runs: curves, tables, figures.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"),
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
    parser = _Parser(prog="bov generate", description="Samples text from a checkpoint.")
    parser.add_argument(
        "checkpoint", help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; again for several"
    )
    parser.add_argument("--prompt-file", metavar="F", help="a file whose text is a prompt; - stdin")
    parser.add_argument(
        "--prompts", metavar="F",
        help='one prompt per line, or per line {"prompt": "..."}; - reads stdin',
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest only")
    parser.add_argument("--top-p", type=float, help="and among those of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="S", help="end before this text; repeatable"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts continued together")
    parser.add_argument(
        "--max-context", type=int,
        help="tokens of prompt and continuation at most; 10 x sequence_len if not given",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--bank-device", choices=["cpu", "mmap"],
        help="keep value tables in the host's memory or in the file",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    known = vars(parser.parse_args(arguments))
    from bov_lightning.inference.generate import Sampling, generate, read_prompts

    prompts = read_prompts(known.pop("prompt"), known.pop("prompt_file"), known.pop("prompts"))
    sampling = Sampling(
        stop=tuple(known.pop("stop")),
        **{
            name: known.pop(name)
            for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        },
    )
    generate(prompts=prompts, sampling=sampling, as_json=known.pop("json"), **known)


def _export(arguments: list[str]) -> None:
    parser = _Parser(
        prog="bov export", description="Writes a checkpoint as a Hugging Face directory."
    )
    parser.add_argument(
        "checkpoint", help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    known = parser.parse_args(arguments)
    import torch

    from bov_lightning.interop.hf_export import export

    difference = export(known.checkpoint, known.output, getattr(torch, known.dtype))
    print(f"{known.output}: logits equal the checkpoint's within {difference:.1g}")


def _import(arguments: list[str]) -> None:
    parser = _Parser(prog="bov import", description="Turns another code's checkpoint into ours.")
    parser.add_argument(
        "kind", choices=["nanochat", "hf"], help="the paper's authors' code, or a bov export"
    )
    parser.add_argument(
        "directory", type=Path, help="model_NNNNNN.pt and meta_NNNNNN.json, or an export"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    known = parser.parse_args(arguments)
    if known.kind == "hf":
        from bov_lightning.interop.hf_export import import_hf as read
    else:
        from bov_lightning.interop.nanochat import import_nanochat as read

    config = read(known.directory, known.output)
    print(f"{known.output}: {config.n_layer} layers, d_model {config.d_model}, {config.value}")


def _recipes(arguments: list[str]) -> None:
    _Parser(prog="bov recipes", description="Lists the recipes of the package.").parse_args(
        arguments
    )
    from bov_lightning.recipe.sections import packaged_recipes

    folder = packaged_recipes()
    for path in sorted(folder.rglob("*.yaml")):
        print(path.relative_to(folder).with_suffix(""))


COMMANDS = {
    "fit": _fit,
    "prepare": _prepare,
    "validate": _validate,
    "plan": _plan,
    "submit": _submit,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "report": _report,
    "generate": _generate,
    "export": _export,
    "import": _import,
    "recipes": _recipes,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0; 2 for the user's mistakes; 75 and 143 for a run that a signal stopped; 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from bov_lightning import __version__

        print(f"bov-lightning {__version__}")
        return 0
    from bov_lightning.distributed.preemption import Preempted
    from bov_lightning.errors import UserError

    try:
        if arguments[0] not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {arguments[0]!r}: {hint}")
        COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        return _fail(str(error))
    except Preempted as preempted:
        return preempted.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"{error.filename or 'the file system'}: {error.strerror}")
    return 0


def _fail(message: str) -> int:
    print(f"bov: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def entry_point() -> None:
    """The console script."""
    if sys.argv[1:2] != ["fit"]:
        sys.exit(main())
    from bov_lightning.distributed import preemption

    preemption.install()
    try:
        code = main()
    finally:
        preemption.ignore()
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
