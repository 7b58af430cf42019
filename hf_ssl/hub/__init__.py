"""From a trained method to a repo that plain transformers opens. Lazy."""

from ..lazy import lazy

_HOMES = {
    "export": "folder", "write_model": "folder", "write_card": "folder", "load_method": "folder",
    "check_parity": "folder", "ParityError": "folder", "model_card": "card", "publish_run": "publish",
    "push_model": "publish", "PublishError": "errors", "draw_pictures": "pictures", "scrub": "privacy",
    "convert_checkpoint": "convert", "read_checkpoint": "checkpoints", "CheckpointError": "checkpoints",
}  # fmt: skip

__all__ = list(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
