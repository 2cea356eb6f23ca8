"""Corpora, tokenizers, packing and the DataModules that feed training."""

from importlib import import_module

_EXPORTS = {
    "PackedDataModule": "data_modules.packed",
    "StandardLibrary": "data_modules.sources",
    "TextFiles": "data_modules.sources",
    "TokenizerConfig": "data_modules.tokenizer",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
