"""Train, compare and serve transformers with Bank of Values attention.

The names below load on first use, so that ``import bov_lightning`` (and ``bov --help``) costs
nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bov_lightning.version import __version__

_EXPORTS = {
    "BankOfValues": "bov_lightning.model.values",
    "ProbeSettings": "bov_lightning.value_probe.settings",
    "ReplicatedStrategy": "bov_lightning.distributed.strategy",
    "ShardedStrategy": "bov_lightning.distributed.strategy",
    "Transformer": "bov_lightning.model.transformer",
    "TransformerConfig": "bov_lightning.model.config",
    "ValueConfig": "bov_lightning.model.config",
    "load": "bov_lightning.inference.loading",
    "probe": "bov_lightning.value_probe.probing",
}

__all__ = [
    "BankOfValues",
    "ProbeSettings",
    "ReplicatedStrategy",
    "ShardedStrategy",
    "Transformer",
    "TransformerConfig",
    "ValueConfig",
    "__version__",
    "load",
    "probe",
]  # fmt: skip

if TYPE_CHECKING:
    from bov_lightning.distributed.strategy import ReplicatedStrategy, ShardedStrategy
    from bov_lightning.inference.loading import load
    from bov_lightning.model.config import TransformerConfig, ValueConfig
    from bov_lightning.model.transformer import Transformer
    from bov_lightning.model.values import BankOfValues
    from bov_lightning.value_probe.probing import probe
    from bov_lightning.value_probe.settings import ProbeSettings


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
