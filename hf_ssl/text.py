"""Text for image-text methods: tokenizers, text tower presets, the native two-tower config, pretrained towers.

Two native models serve: ``CLIPModel`` where both towers are CLIP's own, ``VisionTextDualEncoderModel`` for any other
pair whose towers give one vector per input (``pooler_output`` of shape (B, D)).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
)

from .loading import from_config, load_pretrained
from .spelling import presets

# Fields of CLIPTextConfig. pico and nano suit names and short captions; base is the paper's.
TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "text-pico": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    "text-nano": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
    "text-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "text-base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
}
CONTEXT_LENGTHS = (16, 77)  # tokens of a trained tokenizer: begin and end included
_PAPER_CONTEXT = 77
_END_OF_WORD = "</w>"


# --- tokenizers ---------------------------------------------------------------------------------------------------


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096, context_length: int = 32) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-case byte-level BPE) learned from ``captions``, which plain transformers loads.

    vocab_size: the most tokens it has, at least 514: every byte within and at the end of a word, begin and end of
    text; few captions give fewer. context_length: tokens a text is cut to, 16 to 77, begin and end included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # All 512 byte symbols are there: CLIP's unknown token is the end of text, and the tower would pool at it.
    vocab = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet)]
    if vocab_size < len(vocab) + 2:
        raise ValueError(f"vocab_size must be at least {len(vocab) + 2} (bytes, begin, end), not {vocab_size}.")
    low, high = CONTEXT_LENGTHS
    if not low <= context_length <= high:
        raise ValueError(f"context_length must be from {low} to {high} tokens, not {context_length}.")
    native = CLIPTokenizer().backend_tokenizer  # its normaliser and word splitting, so that training sees the same
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = native.normalizer, native.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=_END_OF_WORD, show_progress=False,
        # Pairs that are equally frequent go by number. Letters at a word's end would be numbered as the trainer's hash
        # table happens to hand out words, in another order in each training; as "special" ones they are numbered here.
        special_tokens=vocab[len(alphabet) :],
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges: list[Any] = []
    known = set(vocab)
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        first, second = merge if isinstance(merge, list) else merge.split(" ")
        merged = first + second
        if merged not in known:
            if len(vocab) + 2 == vocab_size:
                break
            known.add(merged)
            vocab.append(merged)
        merges.append((first, second))
    # Begin and end come last, as in CLIP: transformers' oldest configs pool at the highest id.
    ids = {token: index for index, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    # Kept because few captions give fewer tokens than were asked for.
    asked: Any = {"trained_vocab_size": vocab_size}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=context_length, **asked)


def trained_for(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The numbers that ``train_tokenizer`` was given for ``tokenizer``; {} where it made another one."""
    if "trained_vocab_size" not in tokenizer.init_kwargs:
        return {}
    vocab_size, length = tokenizer.init_kwargs["trained_vocab_size"], tokenizer.model_max_length
    return {"vocab_size": vocab_size, "context_length": length}


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a Hub repo; ValueError if there is none or it cannot pad."""
    try:
        tokenizer = load_pretrained(AutoTokenizer, name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} holds no tokenizer that can be loaded: {error}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up from a config
        raise ValueError(f"{name} holds no tokenizer that can be loaded: its vocabulary is empty")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no padding token: set one and save it again")
    return tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends every text, where CLIP's text tower pools (BERT's tokenizers: [SEP]).

    Raises ValueError for a tokenizer that ends texts without such a token, and for the id 2, which transformers takes
    for a mistake of old checkpoints: its CLIP then pools at the highest id, whatever that is.
    """
    last = tokenizer("a")["input_ids"][-1]
    if last not in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        raise ValueError(
            f"{type(tokenizer).__name__} adds no end-of-text token, and a CLIP text tower pools at it: take a "
            "pretrained text tower, or train a tokenizer on the captions"
        )
    if last == 2:
        raise ValueError(
            f"the end-of-text token of this {type(tokenizer).__name__} has the id 2, for which transformers' CLIP "
            "pools at the highest id instead: take a pretrained text tower, or train a tokenizer on the captions"
        )
    return last


def max_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a text is cut to unless stated otherwise: the tokenizer's own limit, at most CLIP's 77."""
    return min(tokenizer.model_max_length, _PAPER_CONTEXT)


# --- two towers ---------------------------------------------------------------------------------------------------


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
