"""Corpora, tokenizers, packing and the DataModules that feed training."""

from importlib import import_module

_EXPORTS = {
    "HubDataset": "data_modules.sources",
    "Mixture": "data_modules.sources",
    "PackedDataModule": "data_modules.packed",
    "PackingConfig": "data_modules.packing",
    "StandardLibrary": "data_modules.sources",
    "StreamingDataModule": "data_modules.streaming",
    "TextFiles": "data_modules.sources",
    "TokenizerConfig": "data_modules.tokenizer",
    "Weighted": "data_modules.sources",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
