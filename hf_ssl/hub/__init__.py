"""From a trained method to a repo that plain transformers opens. Lazy."""

from importlib import import_module
from typing import Any

_HOMES = {"export": "folder", "load_method": "folder"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
