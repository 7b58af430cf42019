"""From a decoded picture to the views a method eats.

Lazy: `views` and `ops` need numpy and cv2 only; the processor brings in torch and transformers.
"""

from importlib import import_module
from typing import Any

_HOMES = {"SSLImageProcessor": "image_processor", "ViewGroup": "views"}

__all__ = ["SSLImageProcessor", "ViewGroup"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
