"""A size that no memory holds is refused in a sentence, before its weights are made; what may fit passes."""

import pytest
from transformers import ResNetConfig, SwinConfig, ViTConfig

from hf_ssl.training.arguments import ModelArguments
from hf_ssl.training.build import build_method
from hf_ssl.training.fits import check_fits

from .conftest import make_trainer

GIB = 2**30


def eager() -> ViTConfig:
    config = ViTConfig(hidden_size=64, num_attention_heads=4, patch_size=16)
    config._attn_implementation = "eager"
    return config


def test_the_bound_is_what_one_step_cannot_do_without():
    # 100 × 100 patches, 4 heads, 4 bytes: 1.6 GB of attention
    check_fits(eager(), 1600, 1600, 3, memory=1_600_000_000)
    with pytest.raises(ValueError, match=r"attention among the 10,000 patches of one view would take 1.6 GB, and"):
        check_fits(eager(), 1600, 1600, 3, memory=1_599_999_999)
    # 8 views of 1000 × 1000 × 3 numbers of 4 bytes: 96 MB; a Swin attends within windows
    for config in (ResNetConfig(), SwinConfig()):
        check_fits(config, 1000, 1000, 3, images=8, memory=96_000_000)
        with pytest.raises(ValueError, match=r"8 views of 1000×1000 pixels would take 96 MB, .*image_size or batch"):
            check_fits(config, 1000, 1000, 3, images=8, memory=95_000_000)


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_no_weights_are_made_for_a_size_that_cannot_run(method, pictures, monkeypatch):
    monkeypatch.setattr("hf_ssl.training.fits._memory", lambda: 64 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("hf_ssl.training.build.untouched", None)  # what comes next would make them
    with pytest.raises(ValueError, match=r"16000×16000 pixels do not fit into memory: .* 4,000,000 patches"):
        build_method(method, pictures, ModelArguments(backbone="vit-pico", image_size=16000, patch_size=8))


def test_a_trainer_counts_the_views_of_its_batch(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ssl.training.fits._memory", lambda: 98_304)  # 2 views × 16 images × 16 × 16 × 3 × 4 bytes
    make_trainer(pictures, tmp_path)
    with pytest.raises(ValueError, match="34 views of 16×16 pixels would take 104 kB"):
        make_trainer(pictures, tmp_path, per_device_train_batch_size=17)
