"""From names and numbers to a method and its image processor: presets, warm starts, sizes that fit together."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from .. import backbones, distributed, loading, text
from ..data.labels import label_names
from ..data.sources import ImageSource, load_source
from ..methods import load
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from ..spelling import presets
from ..untouched import untouched
from .arguments import ModelArguments, TextArguments
from .fits import check_fits

_TOKENIZER_ROWS = 1_000_000
_TRANSFORMERS = ("vit", "dinov2_with_registers", "dinov3_vit")  # presets of these take a patch and an image size


def default_arguments(name: str) -> dict[str, Any]:
    """Training-argument fields of the method's paper."""
    return dict(load(name).default_arguments)


def build_method(
    name: str,
    source: Any,
    model_args: ModelArguments | None = None,
    config_fields: dict[str, Any] | None = None,
    view_fields: dict[str, Any] | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    text_args: TextArguments | None = None,
    resume: str | Path | None = None,
) -> tuple[SSLModel, SSLImageProcessor]:
    """A method ready to train on ``source``: random weights from ``seed``, or a warm start from a native checkpoint.

    source: anything that ``load_source`` reads.

    Where ``backbone`` is a run of the same method (its ``ssl`` folder or a checkpoint), all of it goes on, heads and
    teachers included, with ``config_fields`` on top of its config and schedules from the start.

    config_fields: fields of the method's config. view_fields: attributes and view fields of its image processor.
    class_names: what a semi-supervised method's classifier tells apart, in the order of the label ids; default: the
    classes of ``source``. An image-text method takes its texts, and the vocabulary of a tokenizer that it trains, from
    ``source``; the first process trains it. resume: a checkpoint of the run that goes on; the tokenizer trained for it
    is read from there.
    """
    model_class = load(name)
    model_args = ModelArguments() if model_args is None else model_args
    if not isinstance(model_args, ModelArguments):
        raise TypeError(
            f"model_args is a {type(model_args).__name__}: the order is build_method(name, images, "
            "ModelArguments(backbone=...), config_fields, view_fields)"
        )
    source = load_source(source).with_channels(model_args.num_channels or 0)
    channels = _channels(model_args, source)
    size: Any = model_args.image_size or model_class.processor_class.size["height"]
    chosen = model_args.backbone or model_class.default_backbone
    if model_class.reads == "texts":
        texts = text_args or TextArguments()
        if resume and not texts.tokenizer and _holds_tokenizer(resume):
            texts = _with_tokenizer_of(texts, str(resume))
        built = build_image_text(model_class, source, model_args, texts, config_fields or {}, view_fields or {}, seed)
        built[0].processor = built[1]
        return _with_attention(built[0], model_args), built[1]
    if class_names is None and model_class.reads == "labels":
        class_names = label_names(source)
    if (class_names is not None) != (model_class.reads == "labels"):
        raise ValueError(f"class_names go with a semi-supervised method and no other; {name} got {class_names}")
    config_class: Any = model_class.config_class
    warm_start = chosen not in backbones.PRESETS
    earlier: dict[str, Any] = {}  # fields of the run that goes on
    if warm_start:
        backbone: Any = _checkpoint_config(chosen)
        if isinstance(backbone, config_class):
            known = {field.name for field in dataclasses.fields(config_class)}
            earlier = {name: value for name, value in backbone.to_dict().items() if name in known}
            backbone = backbone.backbone_config
        if getattr(backbone, "num_channels", channels) != channels:
            raise ValueError(f"{chosen} takes {backbone.num_channels} channels, the images have {channels}")
        size = model_args.image_size or _oblong(backbone) or size
    else:
        backbone = _preset_config(chosen, size, model_args.patch_size, channels)
    if class_names is not None:
        backbone.id2label = dict(enumerate(class_names))
        backbone.label2id = {label: i for i, label in enumerate(class_names)}
    _check_fits(backbone, size, channels)
    fields = dict(config_fields or {})
    if model_class.needs_index:
        fields["num_examples"] = _count_rows(name, source, fields.get("num_examples"))
    config = config_class(**{**earlier, **fields, "backbone_config": backbone})
    with untouched():
        torch.manual_seed(seed)
        model = loading.load_pretrained(model_class, chosen, config=config) if warm_start else model_class(config)
    if warm_start:
        model.backbone.config.name_or_path = chosen  # what header and card name; a whole method brings none
    model.step.zero_()  # of a method that goes on from an earlier run: schedules are this run's
    processor = _build_processor(model_class, size, channels, backbone, view_fields or {})
    model.processor = processor
    return _with_attention(model, model_args), processor


def _channels(model_args: ModelArguments, source: ImageSource) -> int:
    if model_args.num_channels not in (None, source.channels):
        raise ValueError(
            f"num_channels is {model_args.num_channels}, and the images of {source.name} have {source.channels}: "
            "leave it out, or convert the images"
        )
    return source.channels


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


def _with_attention(model: SSLModel, model_args: ModelArguments) -> SSLModel:
    if model_args.attn_implementation:
        loading.check_attention(model_args.attn_implementation, "--attn_implementation")
        model.set_attn_implementation(model_args.attn_implementation)
    return model


def build_image_text(
    model_class: type[SSLModel],
    source: ImageSource,
    model_args: ModelArguments,
    text_args: TextArguments,
    config_fields: dict[str, Any],
    view_fields: dict[str, Any],
    seed: int,
) -> tuple[SSLModel, SSLImageProcessor]:
    """Two towers, or a whole native image-text checkpoint as ``backbone``, and a processor with a tokenizer."""
    if not source.has_captions:
        raise ValueError(
            f"{source.name} (split {source.split}) has no texts to learn from: name the column that holds them with "
            "--caption_column (caption_column=...)"
        )
    channels, size = _channels(model_args, source), model_args.image_size or 224
    vision = model_args.backbone or model_class.default_backbone
    pretrained = None if vision in backbones.PRESETS else _checkpoint_config(vision)
    whole = pretrained is not None and hasattr(pretrained, "text_config")
    tower = text_args.text_backbone or "text-nano"
    warm_text = tower not in text.TEXT_PRESETS and not whole
    read = text_args.tokenizer or (vision if whole else tower if warm_text else None)
    if read is None:
        sizes = (text_args.vocab_size, text_args.context_length)
        tokenizer = distributed.from_first(lambda: text.train_tokenizer(_texts(source, seed), *sizes))
    else:
        tokenizer = text.load_tokenizer(read)
    length = min(text_args.context_length, text.max_tokens(tokenizer))
    if whole:
        if text_args.text_backbone:
            raise ValueError(f"{vision} is a whole image-text model with a text tower of its own: drop text_backbone")
        backbone: Any = pretrained
    else:
        image: Any = pretrained or _preset_config(vision, size, model_args.patch_size, channels, as_dict=True)
        backbone = text.image_text_config(image, tower, tokenizer, text_args.projection_dim, length)
    if (taken := getattr(backbone.vision_config, "num_channels", channels)) != channels:
        raise ValueError(f"{vision} takes {taken} channels, the images have {channels}")
    config_class: Any = model_class.config_class
    config = config_class(backbone_config=backbone, **config_fields)
    _check_fits(config.backbone_config.vision_config, size, channels)
    with untouched():
        torch.manual_seed(seed)
        model = loading.load_pretrained(model_class, vision, config=config) if whole else model_class(config)
    if pretrained is not None and not whole:
        text.load_tower(model.backbone, "vision", vision)
    if warm_text:
        text.load_tower(model.backbone, "text", tower)
    fields = {**view_fields, "tokenizer": tokenizer, "context_length": length}
    return model, _build_processor(model_class, size, channels, backbone.vision_config, fields)


def _with_tokenizer_of(texts: TextArguments, checkpoint: str) -> TextArguments:
    """``texts`` with a checkpoint's tokenizer. ValueError where that was trained for other numbers: it is not anew."""
    trained = text.trained_for(text.load_tokenizer(checkpoint))
    for name, before in trained.items():
        if (now := getattr(texts, name)) != before:
            raise ValueError(
                f"{checkpoint} was trained with other settings: {name} {before} in the checkpoint and {now} here. "
                "Give the old value, or start a new run in another output_dir"
            )
    return dataclasses.replace(texts, tokenizer=checkpoint)


def _holds_tokenizer(folder: str | Path) -> bool:
    return Path(folder, "tokenizer_config.json").is_file()


def _texts(source: ImageSource, seed: int) -> Iterator[str]:
    """What a tokenizer learns from: every row's texts and one as training draws it; of a stream the first rows.

    The draw depends on the texts and the seed alone, and a tokenizer on how often words occur: the same rows in
    another order, from other shards or on more processes, give the same tokenizer.
    """
    assert source.texts is not None
    dataset = source.dataset
    if dataset.column_names and source.texts.column in dataset.column_names:
        dataset = dataset.select_columns(list(source.texts.columns))
    for row in itertools.islice(dataset, _TOKENIZER_ROWS):
        if found := source.texts.texts(row):
            yield from found
            yield source.texts.draw(row, np.random.default_rng((seed, zlib.crc32("\n".join(found).encode()))))


def _preset_config(name: str, size: int, patch: int | None, channels: int, as_dict: bool = False) -> Any:
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


def _checkpoint_config(name: str) -> PreTrainedConfig:
    try:
        return loading.load_pretrained(AutoConfig, name)
    except (OSError, ValueError) as error:
        if "/" in name or Path(name).exists():
            raise ValueError(f"backbone: {error}") from error
        kind = "preset, folder or reachable Hub id"
        raise ValueError(
            f"backbone {name!r} is no {kind} of a native model. {presets(name, backbones.PRESETS)}"
        ) from error


def _check_fits(backbone: PreTrainedConfig, size: int | tuple[int, int], channels: int) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    check_fits(backbone, height, width, channels)


def _oblong(backbone: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) that a checkpoint's positions were made for, where these differ."""
    height, width = backbones.image_size(backbone)
    return (height, width) if height != width else None


def _build_processor(
    model_class: type[SSLModel],
    size: int | tuple[int, int],
    channels: int,
    backbone: PreTrainedConfig,
    view_fields: dict[str, Any],
) -> SSLImageProcessor:
    """The method's processor at ``size``, or (height, width): smaller crops keep the recipe's proportion, in whole
    patches."""
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
    return processor_class(**fields)
