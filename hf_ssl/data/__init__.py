"""Images in: any `datasets` source as a sharded, exactly resumable stream of undecoded rows, and batches of views.

`load_source` finds the pictures, `build_dataloader` delivers batches of their views, `BadImageLedger` remembers the
broken ones. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "BadImageError": "decode",
    "decode_image": "decode",
    "ImageSource": "sources",
    "SourceError": "sources",
    "load_source": "sources",
    "RowStream": "stream",
    "BadImageLedger": "collator",
    "BatchLoader": "collator",
    "TooManyBadImages": "collator",
    "ViewCollator": "collator",
    "build_dataloader": "collator",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
