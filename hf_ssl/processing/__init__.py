"""From a decoded picture to the views a method eats.

Lazy: `views` and `ops` need numpy and cv2 only; the processor brings in torch and transformers.
"""

from ..lazy import lazy

_HOMES = {"SSLImageProcessor": "image_processor", "ViewGroup": "views"}

__all__ = ["SSLImageProcessor", "ViewGroup"]
__getattr__ = lazy(__name__, _HOMES)
