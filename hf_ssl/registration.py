"""Makes transformers' Auto classes know every method, without importing transformers or a method.

AutoConfig and AutoImageProcessor look classes up by a name that they read from a file, so each method gives them
stand-ins, which import the method when they are first used: ``PreTrainedModel``, which every method needs, takes as
long to import as AutoConfig itself. AutoModel and AutoModelForPreTraining look classes up by a config's class, so a
method registers with them as soon as its module has been imported.
"""

import copyreg
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .methods import METHODS

_CONFIGS = "transformers.models.auto.configuration_auto"
_PROCESSORS = "transformers.models.auto.image_processing_auto"


class _StandIn(type):
    """The type of a class that has the name and module of another one, and imports it when called or asked."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_real(cls), name)


def _stand_in(module: str, name: str) -> _StandIn:
    return _StandIn(name, (), {"__module__": module})


def _real(stand_in: _StandIn) -> Any:
    return getattr(import_module(stand_in.__module__), stand_in.__name__)


# transformers' mappings can be pickled, and so can what they hold.
copyreg.pickle(_StandIn, lambda stand_in: (_stand_in, (stand_in.__module__, stand_in.__name__)))  # type: ignore[arg-type]


class _AfterImport:
    """A finder that calls a function with a module as soon as the module has been executed, whoever imports it."""

    def __init__(self, functions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.functions = functions

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self.functions else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        if module.__name__ in self.functions:  # a loader may serve other modules too
            self.functions[module.__name__](module)


def register() -> None:
    """Make AutoConfig, AutoModel, AutoModelForPreTraining and AutoImageProcessor know every method (idempotent)."""
    if _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)
    for name, function in _HOOK.functions.items():
        if name in sys.modules:
            function(import_module(name))  # waits for a thread that is still importing it


def _register_configs(auto: ModuleType) -> None:
    for name, (module, stem) in METHODS.items():
        if f"ssl_{name}" not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(f"ssl_{name}", _stand_in(module, f"{stem}Config"))


def _register_processors(auto: ModuleType) -> None:
    for name, (module, stem) in METHODS.items():
        if f"ssl_{name}" not in auto.IMAGE_PROCESSOR_MAPPING:
            auto.IMAGE_PROCESSOR_MAPPING.register(f"ssl_{name}", {"pil": _stand_in(module, f"{stem}ImageProcessor")})


def _register_method(stem: str, module: ModuleType) -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

    model = getattr(module, f"{stem}ForPreTraining")
    config = model.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForPreTraining.register(config, model, exist_ok=True)
    for key in (config, config.model_type):  # the stand-in lies under the name
        AutoImageProcessor.register(key, model.processor_class, exist_ok=True)


_HOOK = _AfterImport(
    {
        _CONFIGS: _register_configs,
        _PROCESSORS: _register_processors,
        **{module: partial(_register_method, stem) for module, stem in METHODS.values()},
    }
)
