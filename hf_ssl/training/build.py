"""From names and numbers to a method and its image processor: presets, warm starts, sizes that fit together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .. import backbones, loading
from ..data.sources import ImageSource, load_source
from ..methods import load
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from ..spelling import presets
from ..untouched import untouched
from .arguments import ModelArguments
from .fits import check_fits
from .kinds import kind_of

_TRANSFORMERS = ("vit", "dinov2_with_registers", "dinov3_vit")  # presets of these take a patch and an image size


def default_arguments(name: str) -> dict[str, Any]:
    """Training-argument fields of the method's paper."""
    return dict(load(name).default_arguments)


@dataclass(frozen=True)
class Request:
    """What ``build_method`` was asked for."""

    name: str
    model_class: type[SSLModel]
    source: ImageSource
    model_args: ModelArguments
    config_fields: dict[str, Any]
    view_fields: dict[str, Any]
    seed: int
    class_names: Sequence[str] | None
    kind_args: Any
    resume: str | Path | None

    @property
    def channels(self) -> int:
        return self.source.channels


def build_method(
    name: str,
    source: Any,
    model_args: ModelArguments | None = None,
    config_fields: dict[str, Any] | None = None,
    view_fields: dict[str, Any] | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    kind_args: Any = None,
    resume: str | Path | None = None,
) -> tuple[SSLModel, SSLImageProcessor]:
    """A method ready to train on ``source``: random weights from ``seed``, or a warm start from a native checkpoint.

    source: anything that ``load_source`` reads.

    Where ``backbone`` is a run of the same method (its ``ssl`` folder or a checkpoint), all of it goes on, heads and
    teachers included, with ``config_fields`` on top of its config and schedules from the start.

    config_fields: fields of the method's config. view_fields: attributes and view fields of its image processor.
    class_names: what a semi-supervised method's classifier tells apart, in the order of the label ids; default: the
    classes of ``source``. kind_args: ``TextArguments`` for a method that reads texts; those, and the vocabulary of a
    tokenizer that is trained, come from ``source``, and the first process trains it. resume: a checkpoint of the run
    that goes on; the tokenizer trained for it is read from there.
    """
    model_class = load(name)
    model_args = ModelArguments() if model_args is None else model_args
    if not isinstance(model_args, ModelArguments):
        raise TypeError(
            f"model_args is a {type(model_args).__name__}: the order is build_method(name, images, "
            "ModelArguments(backbone=...), config_fields, view_fields)"
        )
    source = load_source(source).with_channels(model_args.num_channels or 0)
    _check_channels(model_args, source)
    kind = kind_of(model_class.reads)
    if class_names is not None and not kind.has_classes:
        raise ValueError(f"class_names go with a semi-supervised method and no other; {name} got {class_names}")
    model, processor = kind.build(
        Request(
            name, model_class, source, model_args, config_fields or {}, view_fields or {}, seed, class_names,
            kind_args, resume,
        )
    )  # fmt: skip
    model.processor = processor
    if model_args.attn_implementation:
        loading.check_attention(model_args.attn_implementation, "--attn_implementation")
        model.set_attn_implementation(model_args.attn_implementation)
    return model, processor


def on_a_backbone(request: Request, class_names: Sequence[str] | None = None) -> tuple[SSLModel, SSLImageProcessor]:
    """A method with one native image backbone; with ``class_names``, a classifier of them."""
    name, model_class, source, model_args = request.name, request.model_class, request.source, request.model_args
    channels = request.channels
    size: Any = model_args.image_size or model_class.processor_class.size["height"]
    chosen = model_args.backbone or model_class.default_backbone
    config_class: Any = model_class.config_class
    warm_start = chosen not in backbones.PRESETS
    earlier: dict[str, Any] = {}  # fields of the run that goes on
    if warm_start:
        backbone: Any = checkpoint_config(chosen)
        if isinstance(backbone, config_class):
            known = {field.name for field in dataclasses.fields(config_class)}
            earlier = {name: value for name, value in backbone.to_dict().items() if name in known}
            backbone = backbone.backbone_config
        if getattr(backbone, "num_channels", channels) != channels:
            raise ValueError(f"{chosen} takes {backbone.num_channels} channels, the images have {channels}")
        size = model_args.image_size or _oblong(backbone) or size
    else:
        backbone = preset_config(chosen, size, model_args.patch_size, channels)
    if class_names is not None:
        backbone.id2label = dict(enumerate(class_names))
        backbone.label2id = {label: i for i, label in enumerate(class_names)}
    check_backbone(backbone, size, channels)
    fields = dict(request.config_fields)
    if model_class.needs_index:
        fields["num_examples"] = _count_rows(name, source, fields.get("num_examples"))
    config = config_class(**{**earlier, **fields, "backbone_config": backbone})
    with untouched():
        torch.manual_seed(request.seed)
        model = loading.load_pretrained(model_class, chosen, config=config) if warm_start else model_class(config)
    if warm_start:
        model.backbone.config.name_or_path = chosen  # what header and card name; a whole method brings none
    model.step.zero_()  # of a method that goes on from an earlier run: schedules are this run's
    return model, build_processor(model_class, size, channels, backbone, request.view_fields)


def _check_channels(model_args: ModelArguments, source: ImageSource) -> None:
    if model_args.num_channels not in (None, source.channels):
        raise ValueError(
            f"num_channels is {model_args.num_channels}, and the images of {source.name} have {source.channels}: "
            "leave it out, or convert the images"
        )


def _count_rows(name: str, source: ImageSource, given: int | None) -> int:
    if source.is_stream and source.shards.lengths is None and source.shards.count > 1:
        raise ValueError(
            f"{name} knows every training image by its row number, and a stream of {source.shards.count} shards of "
            f"unknown length does not number its rows: read {source.name} without --streaming, or as parquet files"
        )
    if (rows := given or source.num_rows) is None:
        raise ValueError(
            f"{name} remembers something of every training image, and {source.name} does not say how many there are: "
            "give --num_examples, or read the source without --streaming"
        )
    return rows


def check_rows(index: torch.Tensor, examples: int, source: ImageSource) -> None:
    """ValueError where a batch of ``source`` has a row number (B,), on the host, that is none of ``examples``."""
    if (largest := int(index.max())) >= examples:
        raise ValueError(
            f"{source.name} has a row {largest} (they count from 0), and the method was built for num_examples="
            f"{examples} training images: give --num_examples {largest + 1} or more, in a new run"
        )


def preset_config(name: str, size: int, patch: int | None, channels: int, as_dict: bool = False) -> Any:
    """The native config of a preset for square pictures of ``size``, or its fields."""
    fields = dict(backbones.from_preset(name, num_channels=channels))
    if fields["model_type"] in (*_TRANSFORMERS, "swin"):
        if fields["model_type"] != "swin":
            patch = patch or (16 if size >= 160 else 8 if size >= 48 else 4)
            fields["patch_size"] = patch
        if patch and size % patch:
            raise ValueError(f"image_size {size} is no multiple of patch_size {patch}")
        fields["image_size"] = size
    if as_dict:
        return fields
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def checkpoint_config(name: str) -> PreTrainedConfig:
    try:
        return loading.load_pretrained(AutoConfig, name)
    except (OSError, ValueError) as error:
        if "/" in name or Path(name).exists():
            raise ValueError(f"backbone: {error}") from error
        kind = "preset, folder or reachable Hub id"
        raise ValueError(
            f"backbone {name!r} is no {kind} of a native model. {presets(name, backbones.PRESETS)}"
        ) from error


def check_backbone(backbone: PreTrainedConfig, size: int | tuple[int, int], channels: int) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    check_fits(backbone, height, width, channels)


def _oblong(backbone: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) that a checkpoint's positions were made for, where these differ."""
    height, width = backbones.image_size(backbone)
    return (height, width) if height != width else None


def build_processor(
    model_class: type[SSLModel],
    size: int | tuple[int, int],
    channels: int,
    backbone: PreTrainedConfig,
    view_fields: dict[str, Any],
    **own: Any,
) -> SSLImageProcessor:
    """The method's processor at ``size``, or (height, width): smaller crops keep the recipe's proportion, in whole
    patches. own: what the kind of data adds to an image processor, such as a tokenizer."""
    processor_class = model_class.processor_class
    unit = backbones.patch_size(backbone) if getattr(backbone, "patch_size", None) else 8
    height, width = (size, size) if isinstance(size, int) else size
    fields: dict[str, Any] = {"size": {"height": height, "width": width}}
    if channels != 3:
        fields["num_channels"] = channels
    if min(height, width) <= 96:  # pictures this small fill their frame: nothing to crop away at evaluation
        fields["eval_crop_pct"] = 1.0
    usual = processor_class.size["height"]
    for group in () if "views" in view_fields else processor_class.views:  # views of one's own state their sizes
        if isinstance(group.get("size"), int) and (height, width) != (usual, usual):
            sides = [max(unit, round(group["size"] * side / usual / unit) * unit) for side in (height, width)]
            fields[group["key"]] = {"size": sides[0] if height == width else sides}
    for name, value in view_fields.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            value = {**fields[name], **value}
        fields[name] = value
    return processor_class(**fields, **own)
