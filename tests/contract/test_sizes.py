"""Backbones and views that are no squares work; sizes that no patch fits are refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import hf_ssl
from hf_ssl import SSLTrainer, SSLTrainingArguments, backbones
from hf_ssl.data import load_source
from hf_ssl.hub import export
from hf_ssl.methods import METHODS
from hf_ssl.training.arguments import ModelArguments
from hf_ssl.training.build import build_method
from tests.contract import tiny
from tests.contract.tiny import TINY, VIT, batch, build, pictures, processor

every_method = pytest.mark.parametrize("name", sorted(METHODS))
WIDE = {**VIT, "image_size": [16, 32]}
MASKING = ("mae", "msn", "pmsn")
LOCAL = [name for name in sorted(METHODS) if "local_pixel_values" in processor(name).view_sizes]


def wide_batch(name: str, size: list[int]) -> dict[str, Any]:
    small = {"local_pixel_values": {"size": [8, 12], "count": 2}} if name in LOCAL else {}
    views = {"pixel_values": {"size": size}} if name == "obow" else {}
    return batch(name, 2, size=size, **small, **views)


@every_method
def test_a_wide_backbone_trains_on_views_of_any_shape(name: str) -> None:
    """At its own size, at others, and with small crops; MAE's and MoCo v3's positions are fixed."""
    model = build(name, WIDE)
    for size in ([16, 32], [8, 24], [24, 16]):
        loss = model(**wide_batch(name, size)).loss
        loss.backward()
        assert loss.isfinite()
    base = backbones.unwrap(model.backbone)
    table = getattr(base.embeddings, "position_embeddings", None)
    if isinstance(table, torch.Tensor) and "embeddings.position_embeddings" not in TINY[name].no_gradient:
        assert (table.grad[0, 1:].abs().sum(-1) > 0).all()
    images = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        found, native = model.eval()(images).embeddings, backbones.unwrap(model.export_backbone)(images)
    if name != "clip":  # whose feature is projected
        assert torch.equal(found, native.last_hidden_state[:, 0])


def test_positions_are_resized_from_the_grid_of_the_config() -> None:
    """Against torch's bicubic resizing of the table as 4 rows of 8; a square is transformers' own affair."""
    model = build("simclr", WIDE).eval().backbone
    images = torch.randn(2, 3, 24, 40)
    table = model.embeddings.position_embeddings.detach()
    grid = table[:, 1:].unflatten(1, (4, 8)).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (6, 10), mode="bicubic", align_corners=False).flatten(2).mT
    with torch.no_grad():
        patches = model.embeddings.patch_embeddings(images)
        tokens = torch.cat([model.embeddings.cls_token.expand(2, -1, -1), patches], dim=1)
        hidden = tokens + torch.cat([table[:, :1], wanted], dim=1)
        for layer in model.layers:
            hidden = layer(hidden)
        torch.testing.assert_close(backbones.features(model, images), model.layernorm(hidden)[:, 0])


@pytest.mark.parametrize("name", ["simclr", "mae", "dino", "msn", "fixmatch"])
def test_a_wide_checkpoint_through_training_and_export(name: str, tmp_path: Path) -> None:
    """Its aspect is that of the views unless an image size is given; plain transformers loads what comes out."""
    AutoModel.from_config(AutoConfig.for_model(**WIDE)).save_pretrained(tmp_path / "wide")
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    data = Dataset.from_dict({"image": pictures(8, side=40), "label": ["a", "b"] * 4}, features=features)
    training = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    if name == "fixmatch":
        report = hf_ssl.fit(tmp_path / "wide", data, labels_per_class=2, unlabeled_ratio=1, **training)
        model, views = report.method, report.views
    else:
        fields = {k: v for k, v in TINY[name].config.items() if k != "teacher_momentum"}
        arguments = ModelArguments(backbone=str(tmp_path / "wide"))
        model, views = build_method(name, load_source(data, label_column=None), arguments, fields)
        SSLTrainer(model, SSLTrainingArguments(str(tmp_path / "run"), save_strategy="no", **training),
                   load_source(data), views).train()  # fmt: skip
    assert views.view_sizes["pixel_values"] == (16, 32)
    assert views.view_sizes.get("local_pixel_values", (8, 12)) in ((8, 12), (8, 16))
    export(model.cpu(), views, tmp_path / "out")
    plain, reader = AutoModel.from_pretrained(tmp_path / "out"), AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = reader(pictures(2, side=50), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels).last_hidden_state[:, 0], model.eval()(pixels).embeddings)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "beit"])
def test_natives_that_know_squares_alone_say_so(kind: str) -> None:
    fields = {**(tiny.DINOV2 if kind != "beit" else VIT), "model_type": kind, "image_size": [16, 32]}
    config = AutoConfig.for_model(**fields, **({"use_absolute_position_embeddings": True} if kind == "beit" else {}))
    with pytest.raises(
        ValueError, match=rf"native {kind} with image_size \[16, 32\] does not run on .* square image_"
    ):
        backbones.build(config)


@pytest.mark.parametrize("name", MASKING)
def test_patches_that_do_not_tile_a_masked_view(name: str, tmp_path: Path) -> None:
    words = r"patches of 4×4 pixels do not tile a view of 18×16, .* such as 16×16"
    model = build(name)
    with pytest.raises(ValueError, match=words):
        model(**wide_batch(name, [18, 16]))
    arguments = SSLTrainingArguments(str(tmp_path), per_device_train_batch_size=2, max_steps=1, use_cpu=True)
    with pytest.raises(ValueError, match=words):
        SSLTrainer(model, arguments, load_source("emoji"), processor(name, size=[18, 16]))
    assert model(torch.randn(2, 3, 18, 16)).embeddings.shape == (2, 16)  # embedding masks nothing


@pytest.mark.parametrize("name", LOCAL)
def test_a_crop_smaller_than_a_patch(name: str, tmp_path: Path) -> None:
    words = "a view of 3×3 pixels is smaller than a patch of 4×4"
    small = {"local_pixel_values": {"size": 3, "count": 2}}
    model = build(name)
    with pytest.raises(ValueError, match=words):
        model(**batch(name, 2, **small))
    arguments = SSLTrainingArguments(str(tmp_path), per_device_train_batch_size=2, max_steps=1, use_cpu=True)
    with pytest.raises(ValueError, match=words):
        SSLTrainer(model, arguments, load_source("emoji"), processor(name, **small))
