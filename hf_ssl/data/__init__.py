"""Images in: any `datasets` source as a sharded, exactly resumable stream of undecoded rows, and batches of views.

`load_source` finds the pictures, `build_dataloader` delivers batches of their views, `BadImageLedger` remembers the
broken ones. Nothing heavy is imported before it is used.
"""

from ..lazy import lazy

_HOMES = {
    "BadImageError": "decode",
    "decode_image": "decode",
    "ImageSource": "sources",
    "LabeledRows": "labels",
    "draw_labeled": "labels",
    "label_names": "labels",
    "SourceError": "sources",
    "load_source": "sources",
    "PairCollator": "pairs",
    "PairStream": "pairs",
    "RowStream": "stream",
    "BadImageLedger": "ledger",
    "BatchLoader": "collator",
    "TooManyBadImages": "ledger",
    "ViewCollator": "collator",
    "build_dataloader": "collator",
}

__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
