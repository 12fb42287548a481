"""Fathom: the open, complete DeepSeek-V4 system. Three names; everything else is imported from its own room."""

import importlib

_HOMES = {"ModelConfig": "fathom.config", "load_model": "fathom.checkpoint.released", "Engine": "fathom.engine.engine"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fathom' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
