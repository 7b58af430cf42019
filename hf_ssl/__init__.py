"""hf_ssl: visual self- and semi-supervised learning on transformers, datasets and Accelerate.

Names load on first use, so ``import hf_ssl`` stays cheap; the Auto classes know every method from then on.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

from .methods import METHODS

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
    "export": "hub",
}
for _module, _stem in METHODS.values():
    for _suffix in ("Config", "ImageProcessor", "ForPreTraining"):
        _EXPORTS[_stem + _suffix] = _module.removeprefix("hf_ssl.")

__all__ = ["METHODS", "__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_ssl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hf_ssl.{_EXPORTS[name]}"), name)
    _register()
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    from .methods import register

    register()


class _RegisterWithAuto(importlib.abc.MetaPathFinder):
    """Registers the methods as soon as the Auto classes are imported; importing those here would cost seconds."""

    target = "transformers.models.auto.modeling_auto"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                # A first import from inside hf_ssl is half-way through its own modules: __getattr__ registers then.
                if not any(key.startswith("hf_ssl.") and key != "hf_ssl.methods" for key in sys.modules):
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _RegisterWithAuto.target in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithAuto())
