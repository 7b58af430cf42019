"""Sizes of native backbones by name, for training from scratch."""

from collections.abc import Mapping
from typing import Any

_DINO_NANO: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "num_register_tokens": 4,
    "layerscale_value": 0.1,  # a short run never gets far from 1e-5
}  # fmt: skip
_DINO_SMALL: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_register_tokens": 4,
    "layerscale_value": 1e-5,
}  # fmt: skip
_DINO_BASE = {**_DINO_SMALL, "hidden_size": 768, "num_attention_heads": 12}
_DINO_LARGE = {**_DINO_SMALL, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

_DINO_PICO = {**_DINO_NANO, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}

# A backbone for a few thousand small pictures (32–64 px), for one GPU day at 224 px, and the usual sizes in between.
PRESETS: dict[str, dict[str, Any]] = {
    "resnet-pico": {
        "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "resnet-nano": {
        "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
    "resnet-18": {
        "model_type": "resnet", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    },
    "resnet-50": {"model_type": "resnet"},
    "convnextv2-nano": {"model_type": "convnextv2", "hidden_sizes": [80, 160, 320, 640], "depths": [2, 2, 8, 2]},
    "vit-pico": {
        "model_type": "vit", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "layer_norm_eps": 1e-6,
    },
    "vit-nano": {
        "model_type": "vit", "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3,
        "intermediate_size": 768, "layer_norm_eps": 1e-6,
    },
    "vit-small": {
        "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
        "intermediate_size": 1536, "layer_norm_eps": 1e-6,
    },
    "vit-base": {"model_type": "vit", "layer_norm_eps": 1e-6},
    "swin-tiny": {"model_type": "swin"},
    "dinov2-pico": {**_DINO_PICO, "model_type": "dinov2_with_registers", "mlp_ratio": 4},
    "dinov2-nano": {**_DINO_NANO, "model_type": "dinov2_with_registers", "mlp_ratio": 4},
    "dinov2-small": {**_DINO_SMALL, "model_type": "dinov2_with_registers", "mlp_ratio": 4},
    "dinov2-base": {**_DINO_BASE, "model_type": "dinov2_with_registers", "mlp_ratio": 4},
    "dinov2-large": {**_DINO_LARGE, "model_type": "dinov2_with_registers", "mlp_ratio": 4, "drop_path_rate": 0.3},
    "dinov3-pico": {**_DINO_PICO, "model_type": "dinov3_vit", "intermediate_size": 512},
    "dinov3-nano": {**_DINO_NANO, "model_type": "dinov3_vit", "intermediate_size": 768},
    "dinov3-small": {**_DINO_SMALL, "model_type": "dinov3_vit", "intermediate_size": 1536},
    "dinov3-base": {**_DINO_BASE, "model_type": "dinov3_vit", "intermediate_size": 3072},
    "dinov3-large": {**_DINO_LARGE, "model_type": "dinov3_vit", "intermediate_size": 4096, "drop_path_rate": 0.3},
}  # fmt: skip


def from_preset(name: str, **overrides: Any) -> Mapping[str, Any]:
    """The config fields of a named backbone, e.g. ``from_preset("vit-nano", image_size=64, patch_size=8)``."""
    if name not in PRESETS:
        raise KeyError(f"no backbone preset {name!r}; there are: {', '.join(PRESETS)}")
    return {**PRESETS[name], **overrides}
