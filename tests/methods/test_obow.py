import pytest
import torch
import torch.nn.functional as F

from hf_ssl import backbones
from hf_ssl.methods.joint_embedding.obow import _inner
from tests.contract.tiny import RESNET, adamw, batch, build, train_step


def filled(**fields):
    model = build("obow", RESNET, levels=[-1], **fields)
    model.vocabulary[0].rows.copy_(torch.randn(12, 12))
    return model


def test_bag_by_hand() -> None:
    """exp(−15 · d² / mean distance to the nearest word), soft over words, largest over places, sum 1."""
    model = filled(inverse_delta=15.0)
    level = torch.randn(3, 12, 2, 2)
    words = model.vocabulary[0].rows
    distances = torch.stack([
        torch.stack([(place - words).square().sum(1) for place in image.flatten(1).T]) for image in level
    ])  # fmt: skip
    scale = distances.amin(2).mean()
    codes = (-15.0 * distances / scale).softmax(2)
    wanted = F.normalize(codes.amax(1), p=1, dim=1)
    (bag,) = model.bags([level])
    torch.testing.assert_close(bag, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bag.sum(1), torch.ones(3))


def test_scale_is_the_average_of_the_steps_before() -> None:
    """Mean nearest distances d0, d1 at momentum .9: in step 2, (.1 · .9 · d0 + .1 · d1) / (1 − .9²)."""
    model = filled(distance_momentum=0.9)
    seen = []
    for step in range(2):
        level = (1 + step) * torch.randn(3, 12, 2, 2)
        distances = torch.cdist(level.flatten(2).mT, model.vocabulary[0].rows).square()
        seen.append(float(distances.amin(2).mean()))
        model.bags([level])
        model.after_optimizer_step()
    wanted = (0.09 * seen[0] + 0.1 * seen[1]) / 0.19
    level, words = torch.randn(1, 12, 1, 1), model.vocabulary[0].rows
    codes = (-15.0 * (level.flatten() - words).square().sum(1) / wanted).softmax(0)
    torch.testing.assert_close(model.bags([level])[0][0], codes, rtol=1e-3, atol=1e-6)


def test_loss_by_hand() -> None:
    model = build("obow", RESNET, kappa=5.0)
    crops = [torch.randn(6, 12), torch.randn(9, 12)]  # two and three crops of three images
    bags = [torch.rand(3, 12).softmax(1), torch.rand(3, 12).softmax(1)]
    total = 0.0
    for rows in crops:
        for level in range(2):
            words = F.normalize(model.vocabulary[level].rows, dim=1)
            weights = 5.0 * F.normalize(model.generators[level](words), dim=1).detach()
            target = bags[level].repeat(len(rows) // 3, 1)
            total += float((target * (target.log() - (rows @ weights.T).log_softmax(1))).sum() / len(rows)) / 2
    assert float(model.predict(crops, bags)) == pytest.approx(total, rel=1e-4)


def test_words_are_local_averages_of_one_place_per_image_after_the_step() -> None:
    model = filled(vocabulary_size=12)
    level, before = torch.randn(4, 12, 5, 5), model.vocabulary[0].rows.clone()
    model.bags([level])
    assert torch.equal(model.vocabulary[0].rows, before)  # the targets of this step are of the old vocabulary
    model.update_state()
    places = F.avg_pool2d(level, 3, 1).flatten(2)
    for image, word in enumerate(model.vocabulary[0].rows[:4]):
        assert (places[image].T - word).abs().amax(1).min() < 1e-5
    assert torch.equal(model.vocabulary[0].rows[4:], before[4:])


def test_micro_batches_take_the_places_of_their_batch() -> None:
    whole, parts = filled(), filled()
    level, words = torch.randn(4, 12, 5, 5), torch.randn(12, 12)
    for model, levels in ((whole, [level]), (parts, level.split(2))):
        model.vocabulary[0].rows.copy_(words)
        for part in levels:
            model.bags([part])
        model.update_state()
    assert torch.equal(whole.vocabulary[0].rows, parts.vocabulary[0].rows)


def test_every_place_has_its_turn() -> None:
    model = filled()
    wide = torch.arange(25.0).view(1, 1, 5, 5).expand(1, 12, 5, 5)
    seen = set()
    for step in range(36):
        model.step.fill_(step)
        seen.add(round(float(model._one_place(wide)[0, 0]), 4))
    assert len(seen) == 9


def test_the_edge_of_a_map_is_dropped_where_there_is_room() -> None:
    assert _inner(torch.zeros(1, 2, 7, 7)).shape == (1, 2, 5, 5)
    assert _inner(torch.zeros(1, 2, 4, 7)).shape == (1, 2, 4, 7)


def test_targets_come_from_the_teacher_and_carry_no_gradient() -> None:
    model = build("obow", RESNET)
    views = batch("obow")
    with torch.no_grad():
        for parameter in model.teacher_backbone.parameters():
            parameter.mul_(1.5)
    seen = []
    original = model.predict
    model.predict = lambda features, bags: seen.append(bags) or original(features, bags)
    model(**views).loss.backward()
    assert not any(bag.requires_grad for bag in seen[0])
    assert all(parameter.grad is None for parameter in model.teacher_backbone.parameters())


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_feature_maps_have_the_shape_of_the_picture(backbone: str) -> None:
    model = build("obow", RESNET) if backbone == "resnet" else build("obow")
    maps = backbones.feature_maps(model.backbone, torch.randn(2, 3, 16, 32), [-2, -1])
    wanted = [(2, 8, 4, 8), (2, 12, 2, 4)] if backbone == "resnet" else [(2, 16, 4, 8)] * 2
    assert [tuple(level.shape) for level in maps] == wanted


def test_feature_maps_of_a_vit_are_its_patches_row_by_row() -> None:
    model = build("obow").eval()
    images = torch.randn(2, 3, 16, 16)
    last = model.backbone(images, output_hidden_states=True).hidden_states[-1][:, 1:]
    (level,) = backbones.feature_maps(model.backbone, images, [-1])
    assert torch.equal(level[:, :, 1, 2], last[:, 1 * 4 + 2])


def test_the_student_is_what_is_exported() -> None:
    model = build("obow")
    assert model.export_backbone is model.backbone
    assert [model.teacher_momentum(p) for p in (0.0, 1.0)] == pytest.approx([0.99, 1.0])


def test_teacher_view_and_levels_are_asked_for_in_words() -> None:
    views = batch("obow")
    views.pop("teacher_pixel_values")
    with pytest.raises(ValueError, match="give teacher_pixel_values"):
        build("obow")(**views)
    with pytest.raises(ValueError, match="levels count hidden states from the last one"):
        build("obow", levels=[0])


def test_it_learns_to_predict_the_words() -> None:
    model = build("obow", RESNET)
    optimizer = adamw(model)
    losses = [float(train_step(model, optimizer, batch("obow", 8, seed=step % 2))) for step in range(12)]
    assert losses[-1] < losses[0]
