"""hf_ssl: visual self- and semi-supervised learning on transformers, datasets and Accelerate.

Names load on first use, so ``import hf_ssl`` stays cheap; the Auto classes know every method from then on.
"""

import importlib.machinery
import sys
from functools import partial
from typing import Any

from .lazy import lazy
from .methods import METHODS, register

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


class _RegisterWithAuto:
    """Registers the methods as soon as the Auto classes are in memory; importing those here would cost seconds.

    It waits until the outermost import of transformers or of ours is complete: no module is met half-way through.
    """

    target = "transformers.models.auto.configuration_auto"

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith(("transformers.", "hf_ssl.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self.execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def execute(self, execute: Any, module: Any) -> None:
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        if self.depth == 0 and self.target in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


if _RegisterWithAuto.target in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterWithAuto())
