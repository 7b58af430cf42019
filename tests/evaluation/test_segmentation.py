"""Attention segmentation against areas counted by hand, and on models with and without a class token."""

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor, ResNetConfig, ViTConfig

from hf_ssl.data.sources import load_source
from hf_ssl.evaluation import (
    NoAttentionError,
    NoMaskError,
    attention_at_mass,
    attention_jaccard,
    attention_segmentation,
    raw_pixels,
    untrained,
)
from hf_ssl.evaluation.segmentation import alpha_mask


def test_the_smallest_set_that_holds_the_mass():
    assert attention_at_mass(torch.tensor([0.1, 0.5, 0.3, 0.1])).tolist() == [False, True, True, False]
    assert attention_at_mass(torch.tensor([0.6, 0.2, 0.2])).tolist() == [
        True,
        False,
        False,
    ]  # exactly 60 %: one is enough
    assert attention_at_mass(torch.tensor([0.59, 0.21, 0.2])).tolist() == [True, True, False]
    assert int(attention_at_mass(torch.full((10,), 0.1)).sum()) == 6
    # a softmax over patches and the class token: the patches' own sum is below 1 and is normalised first
    assert attention_at_mass(torch.tensor([0.01, 0.05, 0.03, 0.01])).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="mass"):
        attention_at_mass(torch.ones(3), mass=0)


def test_jaccard_by_hand():
    # 2 x 2 patches over 4 x 4 pixels. Heads: the top left patch, the top row, the bottom row.
    attention = torch.tensor([[[0.97, 0.01, 0.01, 0.01], [0.5, 0.48, 0.01, 0.01], [0.01, 0.01, 0.5, 0.48]]])
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :3] = True  # 6 pixels: the top left patch and half of the one beside it
    # head 0: 4 of 6.  head 1: both top patches, 8 pixels, 6 of 8.  head 2: bottom row, no pixel in common
    assert attention_jaccard(attention, mask)[0].tolist() == pytest.approx([4 / 6, 6 / 8, 0.0])


def test_grid_follows_the_pictures_shape():
    attention = torch.tensor([[[0.9, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])  # 8 patches over 2 x 4: 2 rows of 4
    wide = torch.zeros(1, 4, 8, dtype=torch.bool)
    wide[0, :2, :2] = True
    assert attention_jaccard(attention, wide).item() == 1.0
    assert attention_jaccard(attention, wide.transpose(1, 2)).item() == 1.0
    with pytest.raises(ValueError, match="grid"):
        attention_jaccard(attention, torch.ones(1, 4, 4, dtype=torch.bool))


def _processor(size: int = 32) -> BitImageProcessor:
    square = {"height": size, "width": size}
    return BitImageProcessor(size={"shortest_edge": size}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _vit():
    return untrained(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
        )
    )


@pytest.mark.parametrize("spec", ["emoji", "emoji:placed"])
def test_masks_of_emoji_lie_where_the_drawing_lies(spec):
    source = load_source(spec, "test")
    look = alpha_mask(source)
    for index in (0, 5):
        row = source.dataset[index]
        picture, mask = look(row, index)
        assert np.array_equal(picture, source.image(row, index)) and mask.shape == picture.shape[:2]
        background = picture[~mask]
        plain = np.median(background, axis=0)  # off the drawing there is one colour, but for the soft edge
        assert (np.abs(background - plain).max(axis=1) < 3).mean() > 0.8
        assert 0.05 < mask.mean() < 0.95


def test_a_vit_gets_figures_and_keeps_its_attention_kernel_and_mode():
    model = _vit().train()
    kernel = model.config._attn_implementation
    result = attention_segmentation(
        model, load_source("emoji:placed", "test"), _processor(), progress=False, max_images=6
    )
    assert result["images"] == 6 and 0 < result["jaccard_mean"] <= result["jaccard_best"] < 1
    assert model.config._attn_implementation == kernel and model.training


def test_the_whole_path_scores_a_perfect_head_one():
    """A mask that is exactly the chosen patches, found again through processor, model and upsampling."""
    from hf_ssl.backbones import last_attention

    model, source, processor = _vit(), load_source("emoji", "test"), _processor()

    def picture_and_mask(row, index):
        picture = source.image(row, index)
        pixels = processor([picture], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            chosen = attention_at_mass(last_attention(model, pixels))[0, 1].reshape(4, 4)
        return picture, chosen.repeat_interleave(16, 0).repeat_interleave(16, 1).numpy()

    result = attention_segmentation(model, source, processor, picture_and_mask, progress=False, max_images=4)
    assert result["jaccard_best"] == 1.0


def test_models_without_a_class_token_and_pictures_without_a_mask_get_a_sentence(tmp_path):
    from PIL import Image

    source = load_source("emoji", "test")
    resnet = untrained(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))
    with pytest.raises(NoAttentionError, match="ResNetModel"):
        attention_segmentation(resnet, source, _processor(), progress=False, max_images=2)
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 50, 90)).save(tmp_path / f"{i}.png")
    opaque = load_source(str(tmp_path))
    assert len(raw_pixels(opaque, progress=False)) == 3
    with pytest.raises(NoMaskError, match="transparency"):
        attention_segmentation(_vit(), opaque, _processor(), progress=False)
