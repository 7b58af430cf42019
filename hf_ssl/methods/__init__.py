"""One file per method. ``METHODS`` names them without importing anything heavy; ``load`` and ``register`` import."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling import SSLModel

# command-line name -> (module, stem of the class names: <stem>Config, <stem>ImageProcessor, <stem>ForPreTraining)
METHODS: dict[str, tuple[str, str]] = {
    "clip": ("hf_ssl.methods.image_text.clip", "SSLCLIP"),
    "dino": ("hf_ssl.methods.joint_embedding.dino", "DINO"),
    "fixmatch": ("hf_ssl.methods.semi_supervised.fixmatch", "FixMatch"),
    "mae": ("hf_ssl.methods.masked.mae", "MAE"),
    "simclr": ("hf_ssl.methods.joint_embedding.simclr", "SimCLR"),
}


def load(name: str) -> "type[SSLModel]":
    """The model class of a method by its command-line name; KeyError-free: a ValueError that lists the methods."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    module, stem = METHODS[name]
    return getattr(importlib.import_module(module), f"{stem}ForPreTraining")


def name_of(model_type: str) -> str:
    """The command-line name of a config's ``model_type``."""
    return model_type.removeprefix("ssl_")


def register() -> None:
    """Make AutoConfig, AutoModel, AutoModelForPreTraining and AutoImageProcessor know every method (idempotent)."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

    for name in METHODS:
        model = load(name)
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForPreTraining):
            auto.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, model.processor_class, exist_ok=True)
