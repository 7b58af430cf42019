"""The native model of a config, and its forward pass on pictures of any size."""

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..loading import from_config
from .kinds import Backbone, check_size, image_size, patch_size
from .positions import know_own_grid


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The native model of ``config`` with random weights, without the learned pooler that no method trains."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    kwargs: dict[str, Any] = {"dtype": torch.get_default_dtype()}  # not that of the checkpoint the config comes from
    height, width = image_size(config)
    if height != width:
        _check_own_size(config)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        # Swin's and ConvNeXt's "pooler" is a plain average that belongs to the feature: keep it.
        kwargs["add_pooling_layer"] = config.model_type == "swin"
    return from_config(AutoModel, config, **kwargs)


def _check_own_size(config: PreTrainedConfig) -> None:
    """ValueError where the native model does not take pictures of its own config's size, which is not square."""
    height, width = image_size(config)
    try:
        with torch.device("meta"), torch.no_grad():
            whole = from_config(AutoModel, copy.deepcopy(config), dtype=torch.float32).eval()
            whole(torch.zeros(1, getattr(config, "num_channels", 3), height, width))
    except (RuntimeError, TypeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"a native {config.model_type} with image_size [{height}, {width}] does not run on pictures of that size "
            f"({cause}): most take positions for those of a square. Take a square image_size (views may have another "
            "shape), or a ViT, whose image_size need not be a square"
        ) from error


def run(backbone: Backbone, pixel_values: Tensor, **kwargs: Any) -> Any:
    """The native forward pass, positions interpolated to the input's size where the model can."""
    pixel_values = pixel_values.to(next(backbone.parameters()).dtype)  # a teacher's may differ from its student's
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pictures come as (B, C, H, W), not as {tuple(pixel_values.shape)}: sequences of patches do not"
        )
    size: Any = tuple(pixel_values.shape[-2:])
    check_size(getattr(backbone, "config", None), *size)
    timm_model: Any = getattr(backbone, "timm_model", None)
    if getattr(timm_model, "num_classes", 0):  # timm's classifier is its own base model: stop before its last layer
        hidden = timm_model.forward_features(pixel_values)
        return BaseModelOutputWithPooling(hidden, timm_model.forward_head(hidden, pre_logits=True))
    taken = inspect.signature(type(backbone).forward).parameters
    if "spatial_shapes" in taken:
        return backbone(**_as_sequences(pixel_values, patch_size(backbone.config)), **kwargs)
    if "interpolate_pos_encoding" in taken:
        kwargs["interpolate_pos_encoding"] = resized = size != image_size(backbone.config)
        if resized:
            know_own_grid(backbone)
    if type(backbone).__name__ == "ViTMAEModel":
        return _unmasked(backbone, pixel_values, **kwargs)
    return backbone(pixel_values, **kwargs)


def _unmasked(backbone: Backbone, pixel_values: Tensor, **kwargs: Any) -> Any:
    """A native masked autoencoder on whole pictures, patches in order: it hides a random 75 % whenever it runs."""
    config = backbone.config
    count = math.prod(side // patch_size(config) for side in pixel_values.shape[-2:])
    order = torch.linspace(0, 1, count, device=pixel_values.device).expand(len(pixel_values), -1)
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        return backbone(pixel_values, noise=order, **kwargs)
    finally:
        config.mask_ratio = ratio


def _as_sequences(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """(B, C, H, W) as SigLIP 2 takes pictures of any shape: flat patches (B, N, p·p·C), their mask, their grids."""
    rows, columns = (side // patch for side in pixel_values.shape[-2:])
    whole = pixel_values[..., : rows * patch, : columns * patch]
    cells = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    grids = torch.tensor([[rows, columns]], device=patches.device).expand(len(patches), -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grids}
