"""hf_ssl: visual self- and semi-supervised learning on transformers, datasets and Accelerate.

Names load on first use, so ``import hf_ssl`` stays cheap; the Auto classes know every method from then on.
"""

from .lazy import lazy
from .methods import METHODS
from .registration import register

__version__ = "0.1.0"

_EXPORTS = {
    "SSLConfig": "modeling",
    "SSLModel": "modeling",
    "SSLOutput": "modeling",
    "SSLImageProcessor": "processing",
    "SSLTrainer": "training",
    "SSLTrainingArguments": "training",
    "load_source": "data.sources",
    "evaluate_backbone": "evaluation",
    "pseudo_label": "evaluation",
    "save_pseudo_labels": "evaluation",
    "load_pseudo_labels": "evaluation",
    "fit": "training.one_call",
    "export": "hub",
}
for _module, _stem in METHODS.values():
    for _suffix in ("Config", "ImageProcessor", "ForPreTraining"):
        _EXPORTS[_stem + _suffix] = _module.removeprefix("hf_ssl.")

__all__ = ["METHODS", "__version__", *_EXPORTS]


__getattr__ = lazy("hf_ssl", _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
