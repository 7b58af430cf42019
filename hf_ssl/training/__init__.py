"""Training on top of ``transformers.Trainer``: arguments, trainer, callbacks, LARS. Lazy."""

from ..lazy import lazy

_HOMES = {
    "DataArguments": "arguments",
    "LARS": "lars",
    "LabelArguments": "kinds.labels",
    "ModelArguments": "arguments",
    "SSLTrainer": "trainer",
    "SSLTrainingArguments": "arguments",
    "TextArguments": "kinds.texts",
    "build_method": "build",
}

__all__ = list(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
