"""From names and numbers to a method and its image processor: presets, warm starts, sizes that fit together."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .. import backbones
from ..data.sources import ImageSource
from ..methods import load
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from .arguments import ModelArguments

_DEFAULT_BACKBONES = {"simclr": "resnet-50", "dino": "vit-small", "mae": "vit-base"}


def default_arguments(name: str) -> dict[str, Any]:
    """Training-argument fields of the method's paper."""
    return dict(load(name).default_arguments)


def build_method(
    name: str,
    source: ImageSource,
    model_args: ModelArguments,
    config_fields: dict[str, Any] | None = None,
    view_fields: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[SSLModel, SSLImageProcessor]:
    """A method ready to train on ``source``: random weights from ``seed``, or a warm start from a native checkpoint.

    config_fields: fields of the method's config. view_fields: attributes and view fields of its image processor.
    """
    model_class = load(name)
    channels = model_args.num_channels or source.channels
    size = model_args.image_size or 224
    chosen = model_args.backbone or _DEFAULT_BACKBONES[name]
    warm_start = chosen not in backbones.PRESETS
    if warm_start:
        backbone = _checkpoint_config(chosen)
        if getattr(backbone, "num_channels", channels) != channels:
            raise ValueError(f"{chosen} takes {backbone.num_channels} channels, the images have {channels}")
    else:
        backbone = _preset_config(chosen, size, model_args.patch_size, channels)
    config_class: Any = model_class.config_class
    config = config_class(backbone_config=backbone, **(config_fields or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class.from_pretrained(chosen, config=config) if warm_start else model_class(config)
    return model, _build_processor(model_class, size, channels, backbone, view_fields or {})


def _preset_config(name: str, size: int, patch: int | None, channels: int) -> PreTrainedConfig:
    fields = dict(backbones.from_preset(name, num_channels=channels))
    if fields["model_type"] in ("vit", "swin"):
        if fields["model_type"] == "vit":
            patch = patch or (16 if size >= 160 else 8 if size >= 48 else 4)
            fields["patch_size"] = patch
        if patch and size % patch:
            raise ValueError(f"image_size {size} is no multiple of patch_size {patch}")
        fields["image_size"] = size
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _checkpoint_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        presets = ", ".join(backbones.PRESETS)
        kind = "folder" if Path(name).exists() else "preset, folder or reachable Hub id"
        raise ValueError(f"backbone {name!r} is no {kind} of a native model. Presets: {presets}.") from error


def _build_processor(
    model_class: type[SSLModel], size: int, channels: int, backbone: PreTrainedConfig, view_fields: dict[str, Any]
) -> SSLImageProcessor:
    """The method's processor at ``size``: smaller crops keep the recipe's proportion, in whole patches."""
    processor_class = model_class.processor_class
    unit = backbones.patch_size(backbone) if getattr(backbone, "patch_size", None) else 8
    fields: dict[str, Any] = {"size": {"height": size, "width": size}}
    if channels != 3:
        fields["num_channels"] = channels
    if size <= 96:  # pictures this small fill their frame: nothing to crop away at evaluation
        fields["eval_crop_pct"] = 1.0
    for group in processor_class.views:
        if isinstance(group.get("size"), int) and size != 224:
            fields[group["key"]] = {"size": max(unit, round(group["size"] * size / 224 / unit) * unit)}
    for name, value in view_fields.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            value = {**fields[name], **value}
        fields[name] = value
    return processor_class(**fields)
