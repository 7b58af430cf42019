from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    VisionTextDualEncoderProcessor,
)

import hf_ssl  # noqa: F401  (registers with the Auto classes)
from hf_ssl.methods.image_text.clip import SSLCLIPImageProcessor
from hf_ssl.processing.image_text import ImageTextProcessor
from tests.contract.tiny import CAPTIONS, TOKENIZER

LONG = "big red waves and small blue ripples and green stripes and grey checks"


@pytest.fixture
def processor() -> SSLCLIPImageProcessor:
    return SSLCLIPImageProcessor(size=16, tokenizer=TOKENIZER)


def picture(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_texts_are_padded_and_cut_with_their_end(processor: SSLCLIPImageProcessor) -> None:
    encoded = processor.encode_text(["big red waves", LONG])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == mask.dtype == torch.int64
    assert ids[0, :5].tolist() == TOKENIZER("big red waves")["input_ids"] and mask[0].tolist() == [1] * 5 + [0] * 11
    assert set(ids[0, 5:].tolist()) == {TOKENIZER.pad_token_id}
    assert len(TOKENIZER(LONG)["input_ids"]) > 16
    assert (ids[:, 0] == TOKENIZER.bos_token_id).all() and ids[1, -1] == TOKENIZER.eos_token_id and mask[1].all()


def test_the_context_length_is_the_tokenizers_unless_given(processor: SSLCLIPImageProcessor) -> None:
    assert processor.context_length == 16
    short = SSLCLIPImageProcessor(size=16, tokenizer=TOKENIZER, context_length=6)
    ids = short.encode_text([LONG])["input_ids"]
    assert ids.shape == (1, 6) and ids[0, -1] == TOKENIZER.eos_token_id
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"])}
    assert ImageTextProcessor(tokenizer=BertTokenizer(vocab=vocabulary)).context_length == 77
    with pytest.raises(ValueError, match="context_length must be a whole number of at least 3, not 2"):
        SSLCLIPImageProcessor(context_length=2)


def test_views_are_one_crop_with_clips_statistics(processor: SSLCLIPImageProcessor) -> None:
    assert processor(picture(), seed=0)["pixel_values"].shape == (1, 1, 3, 16, 16)
    assert processor.image_mean == list(CLIPImageProcessor().image_mean)
    assert processor.image_std == list(CLIPImageProcessor().image_std)
    (group,) = processor.views
    assert not {"hflip", "brightness", "hue", "grayscale_p"} & set(group)  # "left", "red" are words of captions


def test_the_folder_holds_the_tokenizer(processor: SSLCLIPImageProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for loaded in (SSLCLIPImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is SSLCLIPImageProcessor and type(loaded.tokenizer) is CLIPTokenizer
        assert loaded.to_dict() == processor.to_dict() and "tokenizer" not in loaded.to_dict()
        wanted = processor.encode_text(CAPTIONS)
        assert all(torch.equal(value, wanted[key]) for key, value in loaded.encode_text(CAPTIONS).items())
    processor.save_pretrained(tmp_path / "run" / "ssl")
    nested = AutoImageProcessor.from_pretrained(tmp_path / "run", subfolder="ssl")
    assert nested.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    other, unused = SSLCLIPImageProcessor.from_pretrained(
        tmp_path, size=32, tokenizer=TOKENIZER, nothing=1, return_unused_kwargs=True
    )
    assert other.tokenizer is TOKENIZER and other.size["height"] == 32 and unused == {"nothing": 1}


def test_without_a_tokenizer_texts_are_refused_in_words(tmp_path: Path) -> None:
    SSLCLIPImageProcessor(size=16).save_pretrained(tmp_path)
    bare = SSLCLIPImageProcessor.from_pretrained(tmp_path)
    assert bare(picture())["pixel_values"].shape == (1, 1, 3, 16, 16)
    for ask in (lambda: bare.encode_text(["red"]), bare.native_processor):
        with pytest.raises(ValueError, match=r"no tokenizer: give one, SSLCLIPImageProcessor\(tokenizer=...\)"):
            ask()


def test_native_processors(processor: SSLCLIPImageProcessor, tmp_path: Path) -> None:
    image = picture()
    processor.native_processor().save_pretrained(tmp_path)
    native = CLIPProcessor.from_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CLIPProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CLIPImageProcessor
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CLIPTokenizer
    both = native(text=CAPTIONS[:2], images=image, padding=True, return_tensors="pt")
    assert torch.equal(both["pixel_values"], processor.eval_processor()(image, return_tensors="pt")["pixel_values"])
    length = both["input_ids"].shape[1]
    assert torch.equal(both["input_ids"], processor.encode_text(CAPTIONS[:2])["input_ids"][:, :length])
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"])}
    bert = ImageTextProcessor(size=16, tokenizer=BertTokenizer(vocab=vocabulary), context_length=8)
    assert type(bert.native_processor()) is VisionTextDualEncoderProcessor


def test_evaluation_crops_as_every_processor_of_ours() -> None:
    fields = {"size": 16, "eval_crop_pct": 0.8}
    made = SSLCLIPImageProcessor(**fields).eval_processor()
    assert type(made) is CLIPImageProcessor
    assert dict(made.size) == {"shortest_edge": 20} and dict(made.crop_size) == {"height": 16, "width": 16}
    pixels = made(picture(), return_tensors="pt")["pixel_values"]
    wanted = super(ImageTextProcessor, SSLCLIPImageProcessor(**fields)).eval_processor()(
        picture(), return_tensors="pt"
    )
    torch.testing.assert_close(pixels, wanted["pixel_values"])
    gray = SSLCLIPImageProcessor(size=16, num_channels=1)
    assert len(gray.eval_processor().image_mean) == 1
