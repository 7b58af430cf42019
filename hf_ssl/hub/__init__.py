"""From a trained method to a repo that plain transformers opens. Lazy."""

from ..lazy import lazy

_HOMES = {"export": "folder", "load_method": "folder", "model_card": "card"}

__all__ = list(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
