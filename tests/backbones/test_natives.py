"""Which native models ``backbones.features`` takes: a table, held against what transformers calls the feature."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, Siglip2ImageProcessor, TimmWrapperConfig

from hf_ssl import backbones
from hf_ssl.evaluation.natives import image_features

V = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
T = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16,
}  # fmt: skip
_JOINT = {"vision_config": V, "text_config": T, "projection_dim": 12}
_STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}
_WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
IMAGE_TEXT = {
    "siglip": {"vision_config": V, "text_config": T},
    "siglip2": {"vision_config": {**V, "num_patches": 16}, "text_config": T},
    "clip": _JOINT,
    "chinese_clip": _JOINT,
    "blip": {**_JOINT, "image_text_hidden_size": 12},
    "flava": {
        "image_config": V, "text_config": T, "projection_dim": 12,
        "multimodal_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "aimv2": _JOINT,
    "vision-text-dual-encoder": {
        "vision_config": {"model_type": "vit", **V}, "text_config": {"model_type": "bert", **T}, "projection_dim": 12,
    },
}  # fmt: skip
# How the feature is read off the native output of pictures, and how many patches there are.
TOKEN, POOLED, MEAN = "class token", "pooler", "mean"
VISION = {
    "clip_vision_model": (V, TOKEN, 16), "siglip_vision_model": (V, POOLED, 16), "aimv2_vision_model": (V, POOLED, 16),
    "vit": (V, TOKEN, 16), "deit": (V, TOKEN, 16), "vit_msn": (V, TOKEN, 16), "beit": (V, TOKEN, 16),
    "dinov2": (V, TOKEN, 16), "dinov2_with_registers": (V, TOKEN, 16), "dinov3_vit": (V, TOKEN, 16),
    "pixio": (V, TOKEN, 16), "ijepa": (V, MEAN, 16), "swin": (_WINDOWS, POOLED, 16),
    "swinv2": (_WINDOWS, POOLED, 16),
    "resnet": ({"embedding_size": 8, **_STAGES}, POOLED, 4), "convnext": ({"num_stages": 2, **_STAGES}, POOLED, 4),
    "convnextv2": ({"num_stages": 2, **_STAGES}, POOLED, 4),
    "focalnet": ({"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1],
                  "focal_windows": [3, 3]}, POOLED, 16),
}  # fmt: skip


def build(kind: str, fields: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **copy.deepcopy(fields))).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_two_towers(kind: str) -> None:
    """The feature is the image in the joint space, as the native model computes it; patches are the image tower's."""
    model, images = build(kind, IMAGE_TEXT[kind]), torch.randn(2, 3, 16, 16)
    found = backbones.features(model, images)
    assert found.shape == (2, backbones.feature_dim(model)) and found.std() > 0
    assert backbones.is_image_text(model) and torch.equal(image_features(model, images), found)
    assert backbones.patch_tokens(model, images).shape == (2, 16, 16)
    given = {"pixel_values": images}
    if kind == "siglip2":  # its own processor cuts the patches
        pictures = (images * 40 + 128).clamp(0, 255).round().to(torch.uint8)
        given = Siglip2ImageProcessor(patch_size=4, max_num_patches=16)(list(pictures), return_tensors="pt")
        found = backbones.features(model, (pictures / 255 - 0.5) / 0.5)
    native = model.get_image_features(**given)
    native = native if isinstance(native, torch.Tensor) else native.pooler_output
    torch.testing.assert_close(found, native if native.ndim == 2 else native[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", VISION)
def test_one_tower(kind: str) -> None:
    fields, how, patches = VISION[kind]
    model, images = build(kind, fields), torch.randn(2, 3, 16, 16)
    found, output = backbones.features(model, images), model(images)
    hidden = output.last_hidden_state
    wanted = {TOKEN: lambda: hidden[:, 0], POOLED: lambda: output.pooler_output.flatten(1),
              MEAN: lambda: hidden.mean(1)}[how]()  # fmt: skip
    torch.testing.assert_close(found, wanted)
    assert found.shape == (2, backbones.feature_dim(model)) and found.std() > 0
    tokens = backbones.patch_tokens(model, images)
    assert tokens.shape == (2, patches, found.shape[1])
    if hidden.ndim == 3:
        assert torch.equal(tokens, hidden[:, hidden.shape[1] - patches :])  # what stands before is no patch


@torch.no_grad()
def test_a_masked_autoencoder_sees_the_whole_picture() -> None:
    """transformers' own hides 75 % at random whenever it runs: here nothing is hidden, and every pass is alike."""
    model, images = build("vit_mae", V), torch.randn(2, 3, 16, 16)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    found = backbones.features(model, images)
    assert torch.equal(backbones.features(model, images), found) and model.config.mask_ratio == 0.75
    twin = build("vit", V)
    twin.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(found, twin(images).last_hidden_state[:, 0])
    assert backbones.patch_tokens(model, images).shape == (2, 16, 16)


@torch.no_grad()
def test_a_siglip_2_tower_takes_pictures_of_any_shape_and_no_sequences() -> None:
    model = build("siglip2_vision_model", {**V, "num_patches": 16})
    assert backbones.features(model, torch.randn(2, 3, 8, 24)).shape == (2, 16)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), not as \(2, 16, 48\)"):
        backbones.features(model, torch.randn(2, 16, 48))


@torch.no_grad()
def test_timm() -> None:
    model = AutoModel.from_config(TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32})).eval()
    images = torch.randn(2, 3, 32, 32)
    assert backbones.features(model, images).shape == (2, backbones.feature_dim(model))
