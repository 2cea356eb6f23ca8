"""Stage a: which machine, which versions, and whether the packages can be imported."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stage import Results, stage_parser

PACKAGES = (
    "torch", "triton", "transformers", "lightning", "torchmetrics", "tokenizers", "datasets",
    "lm_eval", "jsonargparse", "safetensors", "numpy", "pyarrow", "fsspec", "huggingface_hub",
    "rich", "jinja2", "matplotlib", "scipy", "tensorboard", "torchao", "pytest", "hypothesis",
)  # fmt: skip


def installed(package: str) -> str:
    """Its version, or a dash."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def main() -> None:
    """Prints and keeps it; fails where there is no GPU, or where an import does."""
    options = stage_parser(__doc__).parse_args()
    results = Results(options.output)
    results.keep(python=platform.python_version(), versions={x: installed(x) for x in PACKAGES})
    import torch

    name = platform.processor() or platform.machine()
    if options.device == "cuda":
        subprocess.run(["nvidia-smi"], check=True)
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        results.keep(cuda=torch.version.cuda, capability=torch.cuda.get_device_capability())
    results.keep(machine=f"{name}, torch {torch.__version__}")
    import bov_lightning
    import data_modules
    import evaluation.command

    packages = (bov_lightning, data_modules, evaluation)
    results.keep(packages=[str(Path(package.__file__).parent) for package in packages])


if __name__ == "__main__":
    main()
