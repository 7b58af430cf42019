"""Texts beside images: two native towers are trained, with a tokenizer, and are measured by retrieval."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import backbones, distributed, limits, loading
from ...backbones import two_towers
from ...data.sources import ImageSource
from ...modeling import SSLModel
from ...processing import SSLImageProcessor, tokenizers
from ...untouched import untouched
from ..build import Request, build_processor, check_backbone, checkpoint_config, preset_config
from . import Kind

_TOKENIZER_ROWS = 1_000_000


@dataclass
class TextArguments:
    """Of image-text methods: where the texts come from and what reads them."""

    caption_column: str | None = field(default=None, metadata={"help": "Column with the text; found if not given."})
    text_backbone: str | None = field(
        default=None,
        metadata={"help": "Text tower: preset (text-pico, text-nano, ...), folder or Hub id to start from."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id; default: the text tower's, or one trained on the captions."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a tokenizer that is trained on the captions."})
    context_length: int = field(default=32, metadata={"help": "Tokens per text; longer texts are cut."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the space that images and texts share."})
    limits = {"vocab_size": "[1, inf)", "context_length": "[1, inf)", "projection_dim": "[1, inf)"}

    def __post_init__(self) -> None:
        limits.check(self)


class Texts(Kind):
    arguments = TextArguments
    tested_by_texts = True
    has_bank = False

    def source_options(self, kind_args: TextArguments) -> dict[str, Any]:
        return {"caption_column": kind_args.caption_column}

    def build(self, request: Request) -> tuple[SSLModel, SSLImageProcessor]:
        return _towers(request, _with_tokenizer_of(request.kind_args or TextArguments(), request.resume))

    def measure(
        self,
        method: Any,
        views: SSLImageProcessor,
        bank: ImageSource,
        queries: ImageSource,
        options: dict[str, Any],
    ) -> dict[str, float]:
        """Recall among the texts, both ways."""
        from ...evaluation import text_retrieval

        found = text_retrieval(method.backbone, views.native_processor(), queries, **options)
        return {k: value for k, value in found.items() if k.startswith(("i2t", "t2i")) and "chance" not in k}


def _towers(request: Request, text_args: TextArguments) -> tuple[SSLModel, SSLImageProcessor]:
    """Two towers, or a whole native image-text checkpoint as ``backbone``, and a processor with a tokenizer."""
    model_class, source, model_args = request.model_class, request.source, request.model_args
    if not source.has_captions:
        raise ValueError(
            f"{source.name} (split {source.split}) has no texts to learn from: name the column that holds them with "
            "--caption_column (caption_column=...)"
        )
    channels, size = request.channels, model_args.image_size or 224
    vision = model_args.backbone or model_class.default_backbone
    pretrained = None if vision in backbones.PRESETS else checkpoint_config(vision)
    whole = pretrained is not None and hasattr(pretrained, "text_config")
    tower = text_args.text_backbone or "text-nano"
    warm_text = tower not in two_towers.TEXT_PRESETS and not whole
    read = text_args.tokenizer or (vision if whole else tower if warm_text else None)
    if read is None:
        sizes = (text_args.vocab_size, text_args.context_length)
        tokenizer = distributed.from_first(lambda: tokenizers.train_tokenizer(_texts(source, request.seed), *sizes))
    else:
        tokenizer = tokenizers.load_tokenizer(read)
    length = min(text_args.context_length, tokenizers.max_tokens(tokenizer))
    if whole:
        if text_args.text_backbone:
            raise ValueError(f"{vision} is a whole image-text model with a text tower of its own: drop text_backbone")
        backbone: Any = pretrained
    else:
        image: Any = pretrained or preset_config(vision, size, model_args.patch_size, channels, as_dict=True)
        backbone = two_towers.image_text_config(image, tower, tokenizer, text_args.projection_dim, length)
    if (taken := getattr(backbone.vision_config, "num_channels", channels)) != channels:
        raise ValueError(f"{vision} takes {taken} channels, the images have {channels}")
    config_class: Any = model_class.config_class
    config = config_class(backbone_config=backbone, **request.config_fields)
    check_backbone(config.backbone_config.vision_config, size, channels)
    with untouched():
        torch.manual_seed(request.seed)
        model = loading.load_pretrained(model_class, vision, config=config) if whole else model_class(config)
    if pretrained is not None and not whole:
        two_towers.load_tower(model.backbone, "vision", vision)
    if warm_text:
        two_towers.load_tower(model.backbone, "text", tower)
    own = {"tokenizer": tokenizer, "context_length": length}
    return model, build_processor(model_class, size, channels, backbone.vision_config, request.view_fields, **own)


def _with_tokenizer_of(texts: TextArguments, checkpoint: str | Path | None) -> TextArguments:
    """``texts`` with the tokenizer that a checkpoint holds, where no other is given.

    ValueError where that one was trained for other numbers: it is not trained anew.
    """
    if checkpoint is None or texts.tokenizer or not Path(checkpoint, "tokenizer_config.json").is_file():
        return texts
    trained = tokenizers.trained_for(tokenizers.load_tokenizer(str(checkpoint)))
    for name, before in trained.items():
        if (now := getattr(texts, name)) != before:
            raise ValueError(
                f"{checkpoint} was trained with other settings: {name} {before} in the checkpoint and {now} here. "
                "Give the old value, or start a new run in another output_dir"
            )
    return dataclasses.replace(texts, tokenizer=str(checkpoint))


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
