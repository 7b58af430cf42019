"""Training on top of ``transformers.Trainer``: arguments, trainer, callbacks, LARS. Lazy."""

from importlib import import_module
from typing import Any

_HOMES = {
    "DataArguments": "arguments",
    "LARS": "lars",
    "ModelArguments": "arguments",
    "SSLTrainer": "trainer",
    "SSLTrainingArguments": "arguments",
    "build_method": "build",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
