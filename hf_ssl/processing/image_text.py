"""ImageTextProcessor: views of the pictures and tokens of their texts; the base of image-text methods' processors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    VisionTextDualEncoderProcessor,
)

from ..loading import load_pretrained
from .image_processor import SSLImageProcessor

_NO_TOKENIZER = "this processor has no tokenizer: give one, {name}(tokenizer=...), or load a folder that holds one"


class ImageTextProcessor(SSLImageProcessor):
    """An ``SSLImageProcessor`` that also encodes texts, and saves its tokenizer beside itself.

    tokenizer: any padding tokenizer of transformers; not among the JSON attributes, its own files are in the folder.
    context_length: tokens per text, begin and end included; where only a tokenizer is given, its limit, at most 77.
    Mean and std are CLIP's.
    """

    image_mean: Any = [0.48145466, 0.4578275, 0.40821073]
    image_std: Any = [0.26862954, 0.26130258, 0.27577711]
    context_length: int = 77

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any):
        if tokenizer is not None and kwargs.get("context_length") is None:
            kwargs["context_length"] = min(type(self).context_length, tokenizer.model_max_length)
        super().__init__(**kwargs)
        if (
            isinstance(self.context_length, bool)
            or not isinstance(self.context_length, int)
            or self.context_length < 3
        ):
            raise ValueError(f"context_length must be a whole number of at least 3, not {self.context_length!r}.")
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; ValueError where there is none."""
        if self._tokenizer is None:
            raise ValueError(_NO_TOKENIZER.format(name=type(self).__name__))
        return self._tokenizer

    def encode_text(self, texts: list[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}: (B, context_length) int64, cut with the end token kept, padded."""
        encoded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt",
            return_attention_mask=True, padding_side="right",
        )  # fmt: skip
        return {key: torch.as_tensor(encoded[key], dtype=torch.int64) for key in ("input_ids", "attention_mask")}

    def eval_processor(self) -> CLIPImageProcessor:
        """The native image processor: shortest edge to round(size / eval_crop_pct), bicubic, centre crop."""
        same = super().eval_processor()
        fields = ("size", "crop_size", "resample", "image_mean", "image_std", "do_convert_rgb")
        return CLIPImageProcessor(**{name: getattr(same, name) for name in fields})

    def native_processor(self) -> ProcessorMixin:
        """What is saved with an exported model: pictures and texts in one, as ``AutoProcessor`` gives it back."""
        native = CLIPProcessor if isinstance(self.tokenizer, CLIPTokenizer) else VisionTextDualEncoderProcessor
        return native(self.eval_processor(), self.tokenizer)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The recipe and, in the same folder, the tokenizer."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(save_directory)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """From a folder or Hub repo, with the tokenizer that lies in it, unless ``tokenizer`` is given."""
        tokenizer = kwargs.pop("tokenizer", None)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if tokenizer is None:
            where = {k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "token", "cache_dir") and v}
            folder = Path(pretrained_model_name_or_path, where.get("subfolder", ""))
            if not folder.is_dir() or (folder / "tokenizer_config.json").is_file():
                tokenizer = load_pretrained(AutoTokenizer, pretrained_model_name_or_path, **where)
        processor._tokenizer = tokenizer
        return loaded
