"""InfoMin: both queries meet the same key and queue; what the patches go through, by hand."""

import pytest
import torch
import torch.nn.functional as F

from hf_ssl.losses import info_nce
from hf_ssl.methods.joint_embedding.infomin import InfoMinConfig, InfoMinImageProcessor
from tests.contract.tiny import RESNET, VIT, batch, build, pictures


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_loss_by_hand(backbone: dict) -> None:
    model, twin = build("infomin", backbone, patch_weight=0.25), build("infomin", backbone)
    inputs = batch("infomin", 3)
    views, patches = inputs["pixel_values"], inputs["patch_pixel_values"]
    assert patches.shape == (3, 4, 3, 16, 16)
    with torch.no_grad():
        keys = F.normalize(twin.teacher_projector(twin.encode(views[:, 1:], twin.teacher_backbone)), dim=1)
        flat = patches.transpose(0, 1).flatten(0, 1)  # patch-major
        parts = twin.patch_head.each(twin.features(flat)).unflatten(0, (4, 3))
        jigsaw = twin.patch_head.together(torch.cat([parts[p] for p in range(4)], dim=1))
        query = twin.projector(twin.features(views[:, 0]))
        own, patch = (info_nce(F.normalize(q, dim=1), keys, model.queue.rows, 0.15)[0] for q in (query, jigsaw))
    output = model(**inputs)
    torch.testing.assert_close(output.metrics["view_loss"], own)
    torch.testing.assert_close(output.metrics["patch_loss"], patch)
    torch.testing.assert_close(output.loss, 0.75 * own + 0.25 * patch)
    model.after_optimizer_step()
    torch.testing.assert_close(model.queue.rows[:3], keys)
    assert model.queue.pointer == 3  # the key of the view, once; no patch enters the queue


def test_the_paper_s_views() -> None:
    made = InfoMinImageProcessor()(pictures(2), seed=0)
    assert made["pixel_values"].shape == (2, 2, 3, 224, 224)
    assert made["patch_pixel_values"].shape == (2, 9, 3, 64, 64)


@pytest.mark.parametrize("patches", [None, torch.randn(2, 3, 3, 16, 16)], ids=["none", "three"])
def test_missing_patches_are_an_error(patches: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="needs 4 patches"):
        build("infomin")(torch.randn(2, 2, 3, 16, 16), patches)


def test_a_weight_of_nothing_is_moco() -> None:
    with pytest.raises(ValueError, match="without patches use moco"):
        InfoMinConfig(backbone_config=dict(VIT), patch_weight=0.0)
