"""What a native transformers model is: its towers, its tokens, its sizes. The one place that answers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..loading import load_pretrained

_CLASS_TOKEN = r"embeddings(\.\d+)?\.(cls_token|class_embedding)$"  # by name, of a parameter
Backbone = Any  # a native PreTrainedModel; nn.Module types every attribute as Tensor | Module


def model_kind(model: str | Path | nn.Module) -> str:
    """ "classifier" (AutoModelForImageClassification), "image_text" (CLIP, SigLIP, a dual encoder) or "backbone".

    ``model``: an instance, a folder or a Hub id; of the latter two only config.json is read.
    """
    if isinstance(model, nn.Module):
        kind: type = type(model)
    else:
        architectures = load_pretrained(AutoConfig, model).architectures or [""]
        kind = getattr(transformers, architectures[0], object)
    if "ForImageClassification" in kind.__name__:
        return "classifier"
    return "image_text" if is_image_text(kind) else "backbone"


def is_timm(backbone: Backbone) -> bool:
    """Whether it is a timm model in transformers' wrapper."""
    return hasattr(backbone, "timm_model")


def is_image_text(backbone: Backbone) -> bool:
    """Whether it is a native model with an image and a text tower: CLIP, SigLIP, a dual encoder and their like."""
    return hasattr(backbone, "get_image_features") and hasattr(backbone, "get_text_features")


def projection(backbone: Backbone) -> Any:
    """From an image tower to the joint space; None where the tower ends there (SigLIP)."""
    found = (getattr(backbone, name, None) for name in ("visual_projection", "image_projection"))
    return next((projection for projection in found if projection is not None), None)


def unwrap(model: Backbone) -> Backbone:
    """The base model in a native image classifier, the image tower of two; others, timm's too, are their own."""
    if is_image_text(model):
        return model.vision_model if hasattr(model, "vision_model") else model.image_model  # FLAVA's name
    is_classifier = type(model).__name__.endswith("ForImageClassification") and not is_timm(model)
    return model.base_model if is_classifier else model  # DINOv3's own base_model is not the whole of it


def has_cls(backbone: Backbone) -> bool:
    return bool(class_tokens(backbone))


def class_tokens(backbone: Backbone) -> int:
    """How many class tokens stand before the patches: Pixio has eight. The one of a pooling head is none of them."""
    if is_timm(backbone):
        return 0
    tokens = (p for name, p in backbone.named_parameters() if re.search(_CLASS_TOKEN, name))
    token = next(tokens, None)
    return 0 if token is None else token.shape[1] if token.ndim == 3 else 1


def num_prefix_tokens(backbone: Backbone) -> int:
    """Tokens before the first patch: the class token, DeiT's distillation token and registers."""
    if is_timm(backbone):
        return getattr(backbone.timm_model, "num_prefix_tokens", 0)
    distilled = any(name.endswith("distillation_token") for name, _ in backbone.named_parameters())
    return class_tokens(backbone) + distilled + (getattr(backbone.config, "num_register_tokens", 0) or 0)


def feature_dim(backbone: Backbone) -> int:
    """Width D of ``features``."""
    if is_image_text(backbone):
        joint = getattr(backbone.config, "projection_dim", None) if projection(backbone) is not None else None
        return joint or feature_dim(unwrap(backbone))
    if is_timm(backbone):
        return backbone.timm_model.num_features
    config = backbone.config
    width = getattr(config, "hidden_size", None) or getattr(backbone, "num_features", None)  # FocalNet's
    width = width or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if width is None:
        raise ValueError(
            f"cannot tell the feature width of a {type(backbone).__name__}: its config has no hidden_size"
        )
    return width


def patch_projection(backbone: Backbone) -> Any:
    """The convolution that embeds patches, None where there is none or patches overlap."""
    embeddings = getattr(backbone, "embeddings", None)
    projection: Any = getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
    alone = isinstance(projection, nn.Conv2d) and projection.stride == projection.kernel_size
    return projection if alone and projection.padding == (0, 0) and projection.groups == 1 else None


def patch_size(config: PreTrainedConfig) -> int:
    """Side of a square patch in pixels; ValueError where the backbone has none."""
    size = getattr(config, "patch_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    if size is None:
        raise ValueError(f"a {config.model_type} backbone has no patches: choose a ViT for this method")
    return size


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) in pixels that the position table was built for."""
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_size(config: PreTrainedConfig | None, height: int, width: int, whole: bool = False) -> None:
    """ValueError where a picture is smaller than a patch; whole: where patches do not tile it, either."""
    sides = getattr(config, "patch_size", None)
    if sides is None:
        return
    down, across = (sides, sides) if isinstance(sides, int) else sides
    if height < down or width < across:
        raise ValueError(
            f"a view of {height}×{width} pixels is smaller than a patch of {down}×{across}: take larger views, or a "
            "backbone with smaller patches"
        )
    if whole and (height % down or width % across):
        raise ValueError(
            f"patches of {down}×{across} pixels do not tile a view of {height}×{width}, and whole patches are masked: "
            f"take a size of which both sides are multiples, such as {_near(height, down)}×{_near(width, across)}"
        )


def _near(side: int, patch: int) -> int:
    return max(round(side / patch), 1) * patch


def layer_rates(backbone: Backbone, decay: float, patch_embedding: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Each parameter of a transformer and its share of the learning rate: ``decay`` per block from the end, the tokens
    and embeddings before the first block, ``patch_embedding`` times that for the patch embedding (DINOv2)."""
    depth = backbone.config.num_hidden_layers
    for name, parameter in backbone.named_parameters():
        block = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("embeddings.") else depth + 1
        yield parameter, decay ** (depth + 1 - layer) * (patch_embedding if "patch_embeddings" in name else 1.0)
