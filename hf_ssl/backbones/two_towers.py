"""Native models with an image and a text tower: presets of the text tower, configs, pretrained towers.

Two native models serve: ``CLIPModel`` where both towers are CLIP's own, ``VisionTextDualEncoderModel`` for any other
pair whose towers give one vector per input (``pooler_output`` of shape (B, D)).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
)

from ..loading import from_config, load_pretrained
from ..processing.tokenizers import end_token_id, max_tokens
from ..spelling import presets

# Fields of CLIPTextConfig. pico and nano suit names and short captions; base is the paper's.
TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "text-pico": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    "text-nano": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
    "text-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "text-base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
}


def image_text_config(
    vision: Mapping[str, Any] | PreTrainedConfig,
    text: str | Path | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    projection_dim: int = 512,
    context_length: int | None = None,
) -> CLIPConfig | VisionTextDualEncoderConfig:
    """The native config of an image tower and a text tower that share a space of ``projection_dim`` dimensions.

    vision: config fields with ``model_type`` (``backbones.from_preset(...)``) or a native config. Fields of a square
    ViT beside a text preset become CLIP's own ViT, so that the whole is a ``CLIPModel``; a config stays what it is.
    text: a name in TEXT_PRESETS, a native text config, or the folder or Hub id of a native text model (its config;
    ``load_tower`` brings its weights). context_length: the preset's positions (None: ``max_tokens``).
    Raises ValueError where the parts do not fit: vocabulary, positions, end of text, a tower without a pooled output.
    """
    length = context_length or max_tokens(tokenizer)
    if isinstance(text, str) and text in TEXT_PRESETS:
        text_config: PreTrainedConfig = CLIPTextConfig(
            **TEXT_PRESETS[text], vocab_size=len(tokenizer), max_position_embeddings=length,
            projection_dim=projection_dim, pad_token_id=tokenizer.pad_token_id, eos_token_id=end_token_id(tokenizer),
            bos_token_id=_first(tokenizer.bos_token_id, tokenizer.cls_token_id),
        )  # fmt: skip
    else:
        text_config = text if isinstance(text, PreTrainedConfig) else _text_config_of(text)
    _check_text(text_config, tokenizer, length)
    if not isinstance(vision, PreTrainedConfig):
        vision = _vision_config(dict(vision), isinstance(text_config, CLIPTextConfig), projection_dim)
    sides: dict[str, Any] = {"vision_config": vision.to_dict(), "text_config": text_config.to_dict()}
    if isinstance(vision, CLIPVisionConfig) and isinstance(text_config, CLIPTextConfig):
        return CLIPConfig(**sides, projection_dim=projection_dim)
    if getattr(vision, "hidden_size", None) is None:  # the dual encoder sizes its projection by it
        sides["vision_config"]["hidden_size"] = pooled_width(vision)
    config = VisionTextDualEncoderConfig(**sides, projection_dim=projection_dim)
    check_towers(config)
    return config


def check_towers(config: VisionTextDualEncoderConfig) -> None:
    """ValueError if a tower gives no (B, D) vector, or one of another width than the dual encoder assumes."""
    for kind in ("vision", "text"):
        tower: Any = getattr(config, f"{kind}_config")
        width = pooled_width(tower)
        if getattr(tower, "hidden_size", None) != width:
            raise ValueError(
                f"{kind}_config ({tower.model_type}) needs hidden_size={width}, the width of its pooled output: "
                "the native dual encoder sizes its projection by it"
            )


def pooled_width(config: PreTrainedConfig) -> int:
    """Width D of the native model's ``pooler_output`` (B, D), found without computing; ValueError if it is not so."""
    with torch.device("meta"), torch.no_grad():
        tower = from_config(AutoModel, config, dtype=torch.float32).eval()
        if tower.main_input_name == "input_ids":
            outputs = tower(input_ids=torch.zeros(1, 4, dtype=torch.long))
        else:
            size = getattr(config, "image_size", None) or 224
            height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
            outputs = tower(pixel_values=torch.zeros(1, getattr(config, "num_channels", 3), height, width))
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None or pooled.ndim != 2:
        shape = "no pooler_output" if pooled is None else f"pooler_output of shape {('B', *pooled.shape[1:])}"
        raise ValueError(
            f"{type(tower).__name__} cannot be a tower of the native dual encoder, which needs a pooler_output "
            f"(B, D): it gives {shape}. Image towers that fit: CLIP's, ViT, DINOv2, Swin, ConvNeXt, MobileNetV2, "
            "timm's (a timm ResNet as well); text towers: CLIP's, BERT, RoBERTa, MPNet."
        )
    return pooled.shape[1]


@torch.no_grad()
def load_tower(backbone: PreTrainedModel, kind: Literal["vision", "text"], name: str | Path) -> None:
    """Put the weights of the native model ``name`` (folder or Hub id; a CLIP repo as well) in one tower, in place.

    A learned pooler that the checkpoint does not have keeps its random weights; anything else missing is a ValueError.
    """
    tower: Any = getattr(backbone, f"{kind}_model")
    loaded, report = load_pretrained(
        type(tower), name, config=tower.config, dtype=tower.dtype, output_loading_info=True
    )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} tensors of the {kind} tower, a {type(tower).__name__}: {missing[0]}, ..."
        )
    tower.load_state_dict(loaded.state_dict())


def _first(*ids: int | None) -> int | None:
    return next((value for value in ids if value is not None), None)


def _text_config_of(name: str | Path) -> PreTrainedConfig:
    try:
        config = load_pretrained(AutoConfig, name)
    except (OSError, ValueError) as error:
        if "/" in str(name) or Path(name).exists():
            raise ValueError(f"text tower: {error}") from error
        raise ValueError(
            f"text tower {name!r} is no folder or reachable Hub id of a native model. "
            f"{presets(str(name), TEXT_PRESETS)}"
        ) from error
    return getattr(config, "text_config", config)  # the text half of an image-text repo


def _vision_config(fields: dict[str, Any], beside_clip: bool, projection_dim: int) -> PreTrainedConfig:
    model_type = fields.pop("model_type")
    if model_type == "vit" and beside_clip and isinstance(fields.get("image_size", 224), int):
        model_type = "clip_vision_model"
    if model_type == "clip_vision_model":
        fields["projection_dim"] = projection_dim
    return AutoConfig.for_model(model_type, **fields)


def _check_text(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    vocabulary, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if vocabulary is None:
        raise ValueError(f"a {config.model_type} model has no vocabulary: it cannot be the text tower")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the text tower embeds {vocabulary}: they are no pair"
        )
    if positions is not None and length > positions:
        raise ValueError(f"context_length {length} exceeds the {positions} positions of the text tower")
