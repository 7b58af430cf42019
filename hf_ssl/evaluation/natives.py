"""Opens a native transformers model whole: with its classifier or its text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.backbones import model_kind
from hf_ssl.loading import load_pretrained
from hf_ssl.untouched import untouched


@untouched()
def load_native(model: str | Path | nn.Module, processor: Any = None, device: str | torch.device | None = None):
    """(model, processor, kind): the whole model in float32 and the processor that belongs to its kind.

    A classifier keeps its head; an image-text model comes with a processor that has `.image_processor` and
    `.tokenizer`, all others with an image processor. `processor` may be a native one, one of ours (its native twin is
    used), a folder, or None for the one beside the model. Raises ValueError when a model object comes without one, or
    an image-text model with one that has no tokenizer.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    kind = model_kind(model)
    processor = _processor(model, processor, kind)
    if isinstance(model, nn.Module):
        return model, processor, kind
    auto = AutoModelForImageClassification if kind == "classifier" else AutoModel
    # checkpoints saved in bf16 would otherwise be evaluated in bf16 without a word
    loaded = load_pretrained(auto, model, dtype=torch.float32)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor, kind


def _processor(model: Any, processor: Any, kind: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    auto = AutoProcessor if kind == "image_text" else AutoImageProcessor
    if processor is None:
        if isinstance(model, nn.Module):
            raise ValueError("A model object needs `processor=`: the processor of the pictures it was trained with.")
        processor = load_pretrained(auto, model)
    elif isinstance(processor, (str, Path)):
        processor = load_pretrained(auto, processor)
    if kind != "image_text":
        return image_processor(processor)
    if hasattr(processor, "native_processor"):
        processor = processor.native_processor()
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"An image-text model needs a processor with an image processor and a tokenizer, such as CLIPProcessor; "
            f"{type(processor).__name__} lacks one."
        )
    return processor


def image_processor(processor: Any) -> Any:
    """The native image processor within `processor`: one of ours, a CLIPProcessor, or itself."""
    if hasattr(processor, "eval_processor"):
        processor = processor.eval_processor()
    return getattr(processor, "image_processor", processor)


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): an image-text model's embedding (before normalisation), else the backbone's features."""
    from hf_ssl.backbones import features

    return features(model, pixel_values)


def pooled(output: Any) -> Tensor:
    """The embedding of `get_image_features` or `get_text_features`, which transformers 5 wraps in an output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def class_names(model: Any) -> tuple[str, ...] | None:
    """The classifier's class names in the order of its outputs; None where its config holds only LABEL_0, LABEL_1."""
    names = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
