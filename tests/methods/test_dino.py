import pytest
import torch

from hf_ssl.losses import dino_loss, target_entropies
from tests.contract.tiny import RESNET, batch, build


def test_loss_by_hand() -> None:
    """Two teacher crops, three student crops, two images: 2·3 − 2 = 4 pairs, none of a crop with itself."""
    student, targets = torch.randn(3 * 2, 5), torch.randn(2 * 2, 5).softmax(-1)
    total, pairs = 0.0, 0
    for t in range(2):
        for v in range(3):
            if t != v:
                pairs += 1
                for image in range(2):
                    log_p = (student[v * 2 + image] / 0.1).log_softmax(-1)
                    total -= float((targets[t * 2 + image] * log_p).sum()) / 2
    assert pairs == 4
    assert float(dino_loss(student, targets, 2, 0.1)) == pytest.approx(total / pairs, rel=1e-5)


def test_one_view_is_refused_not_nan() -> None:
    with pytest.raises(ValueError, match="at least 2 views"):
        dino_loss(torch.randn(2, 5), torch.randn(2, 5).softmax(-1), 2, 0.1)
    with pytest.raises(ValueError, match="at least 2 views"):
        build("dino")(torch.randn(2, 1, 3, 16, 16))


def test_large_logits_and_low_precision_stay_finite_and_exact() -> None:
    student, targets = 3e4 * torch.randn(6, 5), torch.randn(4, 5).softmax(-1)
    assert dino_loss(student.half().clamp(-6e4, 6e4), targets, 2, 0.1).isfinite()
    exact = dino_loss(student / 1e4, targets, 2, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dino_loss(student / 1e4, targets, 2, 0.1), exact)


def test_teacher_sees_large_crops_only() -> None:
    model = build("dino")
    views = batch("dino")
    loss = model(**views).loss
    seen, count = model.center.sum.clone(), model.center.count.clone()
    assert count == 8  # two large crops of four images
    model.center.sum.zero_()
    model.center.count.zero_()
    other = model(views["pixel_values"], views["local_pixel_values"].flip(0)).loss
    assert torch.equal(model.center.sum, seen) and not torch.equal(other, loss)


def test_center_by_hand_once_per_optimiser_step_over_all_micro_batches() -> None:
    model = build("dino", center_momentum=0.75)
    logits = torch.randn(3, 8, 12)
    model.center.value.fill_(2.0)
    for teacher in logits[:2]:  # two micro-batches
        model.distil(torch.randn(16, 12), teacher, 4)
        assert (model.center.value == 2).all()  # the loss of every micro-batch uses the centre before the step
    model.after_optimizer_step()
    wanted = 0.75 * 2.0 + 0.25 * logits[:2].flatten(0, 1).mean(0, keepdim=True)
    torch.testing.assert_close(model.center.value, wanted)
    model.distil(torch.randn(16, 12), logits[2], 4)  # the sums started anew
    model.after_optimizer_step()
    torch.testing.assert_close(model.center.value, 0.75 * wanted + 0.25 * logits[2].mean(0, keepdim=True))


def test_evaluating_leaves_the_center_alone() -> None:
    model = build("dino").eval()
    model(**batch("dino"))
    assert model.center.count == 0 and not model.center.sum.any()


def test_center_is_subtracted_before_the_temperature() -> None:
    model = build("dino", teacher_temperature=0.5, warmup_teacher_temperature=0.5)
    logits = torch.randn(8, 12)
    model.center.value.normal_()
    targets = model.log_targets(logits).exp()
    torch.testing.assert_close(targets, ((logits - model.center.value) / 0.5).softmax(-1))


def test_temperature_warms_up_over_its_share_of_the_run() -> None:
    model = build("dino", warmup_teacher_temperature=0.04, teacher_temperature=0.08, teacher_temperature_warmup=0.5)
    model.total_steps.fill_(8)
    seen = []
    for step in (0, 2, 4, 8):
        model.step.fill_(step)
        seen.append(float(model.teacher_temperature()))
    assert seen == pytest.approx([0.04, 0.06, 0.08, 0.08])


def test_momentum_rises_to_one() -> None:
    model = build("dino", teacher_momentum=0.9)
    assert [model.teacher_momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.95, 1.0])


def test_last_layer_waits_but_its_teacher_does_not() -> None:
    model = build("dino", freeze_last_layer=0.2, teacher_momentum=0.5)
    with torch.no_grad():
        model.head.last_layer.weight_v.add_(1.0)  # student and teacher differ
    before = model.teacher_head.last_layer.weight_v.clone()
    for progress, frozen in ((0.1, True), (0.2, False)):
        model.zero_grad()
        model(**batch("dino")).loss.backward()
        model.before_optimizer_step(progress)
        assert (model.head.last_layer.weight_v.grad is None) == frozen
        assert model.head.mlp[0].weight.grad is not None
    model.after_optimizer_step(0.1)
    assert not torch.equal(model.teacher_head.last_layer.weight_v, before)


def test_prototype_gain_is_frozen_only_if_asked() -> None:
    for frozen in (True, False):
        gain = build("dino", norm_last_layer=frozen).head.last_layer.weight_g
        assert gain.requires_grad is not frozen and (gain == 1).all()


def test_the_teacher_is_exported() -> None:
    model = build("dino").eval()
    with torch.no_grad():
        model.backbone.embeddings.cls_token.add_(1.0)
    images = torch.randn(2, 3, 16, 16)
    teacher = model.teacher_backbone(images).last_hidden_state[:, 0]
    assert model.export_backbone is model.teacher_backbone and torch.equal(model(images).embeddings, teacher)


def test_entropies_name_both_kinds_of_collapse() -> None:
    one_hot = torch.eye(4)
    metrics = target_entropies(one_hot)
    assert float(metrics["teacher_entropy"]) == 0 and float(metrics["prototype_entropy"]) == pytest.approx(
        1.3863, abs=1e-4
    )
    metrics = target_entropies(one_hot[:1].expand(4, -1))
    assert float(metrics["prototype_entropy"]) == 0  # everything on one prototype
    metrics = target_entropies(torch.full((3, 4), 0.25))
    assert float(metrics["teacher_entropy"]) == pytest.approx(1.3863, abs=1e-4)


def test_positions_of_small_crops_as_the_released_code_resizes_them() -> None:
    plain, official = build("dino"), build("dino", interpolate_offset=0.1)
    small, native = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.features(native), official.features(native))
    assert not torch.allclose(plain.features(small), official.features(small), atol=1e-5)


def test_batchnorm_of_crops_together_or_apart() -> None:
    views = batch("dino")
    with torch.no_grad():
        losses = [
            float(build("dino", RESNET, use_bn_in_head=True, joint_batchnorm=kind)(**views).loss)
            for kind in (True, False)
        ]
        plain = [float(build("dino", joint_batchnorm=kind)(**views).loss) for kind in (True, False)]
    assert abs(losses[0] - losses[1]) > 1e-5
    assert plain[0] == pytest.approx(plain[1], abs=1e-5)  # a ViT without BatchNorm does not care
