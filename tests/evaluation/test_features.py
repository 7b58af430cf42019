"""Features of real pictures by real native models; what the extraction must leave as it was; what it must name."""

import io
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    BitImageProcessor,
    ConvNextV2Config,
    Dinov2Config,
    DINOv3ViTConfig,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation import extract_features, load_backbone, raw_pixels, untrained

_TOKENS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
CONFIGS = {
    "resnet": (ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"), 8),
    "vit": (ViTConfig(**_TOKENS, intermediate_size=16), 16),
    "dinov2": (Dinov2Config(**_TOKENS), 16),
    "dinov3": (DINOv3ViTConfig(**_TOKENS, intermediate_size=16), 16),
    "convnextv2": (ConvNextV2Config(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2), 8),
    "swin": (SwinConfig(image_size=16, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=4), 8),
    "timm": (TimmWrapperConfig(architecture="resnet10t", num_labels=0), 512),
}


def _processor(channels: int = 3, **kwargs) -> BitImageProcessor:
    size = {"height": 16, "width": 16}
    half = [0.5] * channels
    return BitImageProcessor(size={"shortest_edge": 16}, crop_size=size, image_mean=half, image_std=half, **kwargs)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _source(files: list[bytes], stream: bool = False, **kwargs) -> ImageSource:
    rows = {"image": [{"bytes": data, "path": None} for data in files], "label": [i % 3 for i in range(len(files))]}
    rows["colour"] = [f"c{i}" for i in range(len(files))]
    dataset = datasets.Dataset.from_dict(rows)
    return ImageSource("mine", dataset.to_iterable_dataset() if stream else dataset, "test", ("label",), **kwargs)


def _pictures(n: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [_png(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_of_native_models(name):
    config, dim = CONFIGS[name]
    found = extract_features(untrained(config), _source(_pictures(3)), _processor(), batch_size=2, progress=False)
    assert found.embeddings.shape == (3, dim) and found.embeddings.dtype == torch.float32
    assert found.labels == {"label": [0, 1, 2]} and found.index.tolist() == [0, 1, 2]
    assert not found.embeddings.requires_grad


def test_features_are_those_of_plain_transformers_in_eval_mode():
    model = untrained(CONFIGS["resnet"][0])
    with torch.no_grad():  # move BatchNorm's statistics: train mode would now give something else
        model.train()(torch.randn(8, 3, 16, 16))
    files = _pictures(3)
    pictures = [np.array(Image.open(io.BytesIO(f))) for f in files]
    pixels = _processor()(pictures, return_tensors="pt")["pixel_values"]
    statistics = [b.clone() for b in model.buffers()]
    found = extract_features(model, _source(files), _processor(), batch_size=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    with torch.no_grad():
        expected = model.eval()(pixels).pooler_output.flatten(1)
    assert torch.allclose(found.embeddings, expected, atol=1e-6)


def test_the_mode_of_every_submodule_is_restored_even_after_an_error():
    model = untrained(CONFIGS["resnet"][0]).train()
    frozen = model.embedder.embedder.normalization.eval()  # frozen on purpose inside a training model
    before = {name: module.training for name, module in model.named_modules()}
    extract_features(model, _source(_pictures(2)), _processor(), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before and not frozen.training
    with pytest.raises(ValueError, match="channel dimension"):
        extract_features(model, _source(_pictures(2)), _Wrong(), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


class _Wrong:
    image_mean = (0.5,) * 3

    def __call__(self, pictures, **kwargs):
        return {"pixel_values": torch.zeros(len(pictures), 5, 16, 16)}


def test_a_folder_is_loaded_in_float32_and_half_precision_is_said(tmp_path, caplog):
    model = untrained(CONFIGS["vit"][0]).bfloat16()
    model.save_pretrained(tmp_path)
    _processor().save_pretrained(tmp_path)
    source = _source(_pictures(2))
    found = extract_features(tmp_path, source, progress=False, device="cpu")
    loaded, processor = load_backbone(tmp_path)
    assert loaded.dtype == torch.float32 and processor.crop_size["height"] == 16
    expected = extract_features(
        AutoModel.from_pretrained(tmp_path, dtype=torch.float32), source, _processor(), progress=False
    )
    assert torch.equal(found.embeddings, expected.embeddings)
    with caplog.at_level(logging.WARNING):
        half = extract_features(model, source, _processor(), progress=False)
    assert "bfloat16" in caplog.text and half.embeddings.dtype == torch.float32


def test_autocast_around_the_call_does_not_reach_the_features():
    model, source = untrained(CONFIGS["vit"][0]), _source(_pictures(2))
    plain = extract_features(model, source, _processor(), progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extract_features(model, source, _processor(), progress=False)
    assert torch.equal(plain.embeddings, inside.embeddings)


def test_bad_pictures_are_left_out_and_named(caplog):
    files = _pictures(5)
    files[1], files[3] = b"", files[3][:60]
    found = extract_features(untrained(CONFIGS["vit"][0]), _source(files), _processor(), batch_size=2, progress=False)
    assert found.index.tolist() == [0, 2, 4] and found.labels["label"] == [0, 2, 1]
    assert len(found.skipped) == 2 and "row 1" in found.skipped[0] and "row 3" in found.skipped[1]
    assert "row 3" in caplog.text
    with pytest.raises(ValueError, match="could be read"):
        raw_pixels(_source([b"", b""]), progress=False)


def test_workers_streams_and_batch_size_give_the_same_features():
    model, files = untrained(CONFIGS["vit"][0]), _pictures(7)
    one = extract_features(model, _source(files), _processor(), progress=False, columns=("colour",))
    for source, workers in ((_source(files), 2), (_source(files, stream=True), 0), (_source(files, stream=True), 2)):
        other = extract_features(
            model, source, _processor(), batch_size=3, num_workers=workers, progress=False, columns=("colour",)
        )
        assert torch.allclose(one.embeddings, other.embeddings, atol=1e-5)
        assert other.labels == one.labels and other.index.tolist() == list(range(7))


def test_max_images_is_a_fixed_random_subset_and_select_keeps_rows_together():
    source = _source(_pictures(12))
    some, again = (raw_pixels(source, size=4, progress=False, max_images=5) for _ in range(2))
    everything = raw_pixels(source, size=4, progress=False)
    assert len(some) == 5 and some.index.tolist() == again.index.tolist() != list(range(5))
    assert torch.equal(some.embeddings, everything.select(some.index).embeddings)
    assert some.labels["label"] == [i % 3 for i in some.index.tolist()]
    assert len(raw_pixels(_source(_pictures(12), stream=True), size=4, progress=False, max_images=5)) == 5


def test_raw_pixels_by_hand():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2, :2] = (255, 51, 0)  # area averaging to 2 x 2 keeps the top left corner as it is
    found = raw_pixels(_source([_png(picture)]), size=2, progress=False)
    assert found.embeddings[0].tolist() == pytest.approx([1.0, -0.6, -1.0] + [-1.0] * 9, abs=1e-6)


def test_one_channel_pictures_stay_one_channel():
    rng = np.random.default_rng(0)
    source = _source([_png(rng.integers(0, 255, (20, 20), dtype=np.uint8)) for _ in range(3)], channels=1)
    model = untrained(ViTConfig(**_TOKENS, intermediate_size=16, num_channels=1))
    assert extract_features(model, source, _processor(1), progress=False).embeddings.shape == (3, 16)
    assert raw_pixels(source, size=4, progress=False).embeddings.shape == (3, 16)
    rgb = extract_features(untrained(CONFIGS["vit"][0]), source, _processor(), progress=False)  # a 3-channel model
    assert rgb.embeddings.shape == (3, 16)


def test_untrained_is_seeded_fresh_and_leaves_the_random_state():
    model = untrained(CONFIGS["vit"][0], seed=1)
    state = torch.get_rng_state()
    same, twin, other = untrained(CONFIGS["vit"][0], seed=1), untrained(model, seed=2), untrained(model, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(m.named_parameters()) for m in (model, same, twin, other)]
    name = next(n for n, p in weights[0].items() if p.ndim == 2)
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
    assert not torch.equal(weights[2][name], weights[3][name])
    assert not twin.training


def test_placed_emoji_are_the_same_pictures_every_time():
    source = load_source("emoji:placed", "test")
    first, second = (raw_pixels(source, size=8, progress=False, max_images=6) for _ in range(2))
    assert torch.equal(first.embeddings, second.embeddings)
    assert set(first.labels) == {"group", "subgroup"}


def test_nan_features_are_named_not_scored():
    model = untrained(CONFIGS["vit"][0])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN.*float32"):
        extract_features(model, _source(_pictures(2)), _processor(), progress=False)
    with pytest.raises(ValueError, match="processor="):
        extract_features(model, _source(_pictures(2)), progress=False)
