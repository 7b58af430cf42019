import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ssl.methods.joint_embedding.pirl import PIRLConfig, PIRLImageProcessor
from tests.contract.tiny import RESNET, VIT, batch, build, pictures


def test_both_parts_by_hand() -> None:
    """λ of the patches' loss and 1 − λ of the image's own, against the same rows; patches side by side in one head."""
    model, views = build("pirl", patch_weight=0.25), batch("pirl")
    model.step.fill_(7)
    images, patches, index = views["pixel_values"], views["patch_pixel_values"], views["index"]
    output = model(**views)
    own = F.normalize(model.projector(model.features(images[:, 0])), dim=1)
    each = [model.patch_head.each(model.features(patch)) for patch in patches.unbind(1)]
    shuffled = F.normalize(model.patch_head.together(torch.cat(each, dim=1)), dim=1)
    own_loss, _ = model.discriminate(own, index)
    patch_loss, _ = model.discriminate(shuffled, index)
    torch.testing.assert_close(output.loss, 0.75 * own_loss + 0.25 * patch_loss)
    torch.testing.assert_close(output.metrics["patch_loss"], patch_loss.detach())


def test_the_bank_learns_from_the_image_alone() -> None:
    model, views = build("pirl", bank_momentum=0.0), batch("pirl")
    assert torch.allclose(model.bank.rows.norm(dim=1), torch.ones(24))  # from the start: unit vectors
    own = F.normalize(model.projector(model.features(views["pixel_values"][:, 0])), dim=1)
    model(**views)
    model.after_optimizer_step()
    torch.testing.assert_close(model.bank.rows[:4], own.detach())


def test_all_patches_count_and_their_order_does() -> None:
    model, views = build("pirl"), batch("pirl")
    loss = model(**views).metrics["patch_loss"]
    for place in range(4):
        patches = views["patch_pixel_values"].clone()
        patches[:, place] += 1
        assert model(**{**views, "patch_pixel_values": patches}).metrics["patch_loss"] != loss
    turned = views["patch_pixel_values"].flip(1)
    assert model(**{**views, "patch_pixel_values": turned}).metrics["patch_loss"] != loss


def linears(head: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(module.weight.shape) for module in head.modules() if isinstance(module, nn.Linear)]


def test_heads() -> None:
    model = build("pirl", num_patches=9)
    assert linears(model.projector) == linears(model.patch_head.each) == [(8, 16)]
    assert linears(model.patch_head)[-1] == (8, 72)
    deep = build("pirl", RESNET, hidden_dim=20, criterion="cross_entropy")
    assert linears(deep.projector) == [(20, 12), (8, 20)]
    assert linears(deep.patch_head) == [(20, 12), (8, 20), (8, 32)]
    assert deep(**batch("pirl")).loss.isfinite()


def test_what_it_cannot_train_on_is_refused_in_words() -> None:
    model, views = build("pirl"), batch("pirl")
    with pytest.raises(ValueError, match=r"PIRL needs 4 patches of each image \(patch_pixel_values\), got none"):
        model(views["pixel_values"], index=views["index"])
    with pytest.raises(ValueError, match="got 3"):
        model(views["pixel_values"], views["patch_pixel_values"][:, :3], views["index"])
    with pytest.raises(ValueError, match="pass index"):
        model(views["pixel_values"], views["patch_pixel_values"])
    with pytest.raises(ValueError, match="patch_weight must lie between 0 and 1"):
        PIRLConfig(backbone_config=dict(VIT), patch_weight=2)


def test_the_papers_views() -> None:
    views = PIRLImageProcessor()(pictures(2, side=120), seed=0)
    assert {key: tuple(view.shape) for key, view in views.items()} == {
        "pixel_values": (2, 1, 3, 224, 224), "patch_pixel_values": (2, 9, 3, 64, 64)
    }  # fmt: skip
