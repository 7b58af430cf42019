"""DINOv3's second stage: the Gram teacher, what it sees, when it is taken anew, and how a run goes on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ssl import SSLDINOv3ForPreTraining, backbones
from hf_ssl.losses import gram_loss
from hf_ssl.methods.joint_embedding.dinov3 import SSLDINOv3ImageProcessor
from hf_ssl.momentum import Snapshot
from tests.contract.tiny import DINOV3, adamw, batch, build, pictures, processor, train_step

GRAM = {"gram_weight": 2.0, "gram_warmup": 0.0}
CROPS = {"gram_pixel_values": {"count": 2, "size": 32}}


def test_gram_loss_by_hand() -> None:
    student, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = torch.zeros(())
    for b in range(2):
        for i in range(3):
            for j in range(3):
                mine, theirs = (F.cosine_similarity(x[b, i], x[b, j], dim=0) for x in (student, target))
                wanted += (mine - theirs).square() / 18
    torch.testing.assert_close(gram_loss(student, target), wanted)
    torch.testing.assert_close(gram_loss(3 * target, target), torch.zeros(()))


def test_the_gram_teacher_sees_the_crops_large_and_plain() -> None:
    model, plain = build("dinov3", DINOV3, **GRAM), build("dinov3", DINOV3)
    for parameter in model.gram.model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    views = batch("dinov3", 3, **CROPS)
    assert views["gram_pixel_values"].shape == (3, 2, 3, 32, 32)
    plain_views = {key: value for key, value in views.items() if key != "gram_pixel_values"}
    output = model(**views)
    with torch.no_grad():
        maps = backbones.patch_tokens(model.gram.model, views["gram_pixel_values"].flatten(0, 1))
        maps = maps.transpose(1, 2).reshape(6, 16, 8, 8)
        target = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        student = model.distil(**{**plain_views})[1].patches
        anchored = gram_loss(student, target)
        whole = gram_loss(student, backbones.patch_tokens(model.gram.model, views["pixel_values"].flatten(0, 1)))
    torch.testing.assert_close(output.metrics["gram_loss"], anchored)
    torch.testing.assert_close(output.loss.detach(), plain(**plain_views).loss.detach() + 2 * anchored)
    torch.testing.assert_close(
        model(**plain_views).metrics["gram_loss"], whole
    )  # without its own crops: the teacher's
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.gram.parameters())


def test_the_gram_loss_is_reached_linearly() -> None:
    views, losses = batch("dinov3"), []
    model = build("dinov3", DINOV3, gram_weight=4.0, gram_warmup=0.5)
    model.gram.model.load_state_dict({k: v + 0.05 for k, v in model.gram.model.state_dict().items()})
    model.total_steps.fill_(8)
    for step in (0, 1, 4, 6):
        model.step.fill_(step)
        output = model(**views)
        rest = build("dinov3", DINOV3)
        rest.total_steps.fill_(8)
        rest.step.fill_(step)
        losses.append(float((output.loss - rest(**views).loss).detach() / output.metrics["gram_loss"]))
    assert losses == pytest.approx([0.0, 1.0, 4.0, 4.0], abs=1e-3)


def test_the_gram_teacher_is_taken_anew_every_so_often(tmp_path) -> None:
    """Every second step, twice: the EMA teacher of then, bit for bit, and so in a run that was saved and loaded."""
    model = build("dinov3", DINOV3, **GRAM, gram_every=2, gram_updates=2, teacher_momentum=0.5)
    model.total_steps.fill_(10)
    optimizer, taken = adamw(model), [copy.deepcopy(model.teacher_backbone.state_dict())]
    for step in range(7):
        if step == 3:
            model.save_pretrained(tmp_path)
            again = SSLDINOv3ForPreTraining.from_pretrained(tmp_path).train()
            state, optimizer = copy.deepcopy(optimizer.state_dict()), adamw(again)
            optimizer.load_state_dict(state)
            assert int(again.gram.steps) == 3 and not any(p.requires_grad for p in again.gram.parameters())
            model = again
        train_step(model, optimizer, batch("dinov3", seed=step))
        if step in (1, 3):
            taken.append(copy.deepcopy(model.teacher_backbone.state_dict()))
        for key, value in model.gram.model.state_dict().items():
            assert torch.equal(value, taken[-1][key]), (step, key)
    assert len(taken) == 3 and not model.gram.model.training
    key = "model.layer.0.mlp.up_proj.weight"
    assert not torch.equal(taken[0][key], taken[1][key]) and not torch.equal(taken[1][key], taken[2][key])


def test_a_snapshot_counts_on_from_what_is_loaded_into_it() -> None:
    source = nn.Linear(2, 2)
    old, new = Snapshot(source, every=2, times=9), Snapshot(source, every=2, times=9)
    for _ in range(3):
        old.advance(source)
    for _ in range(2):
        new.advance(source)
    new.load_state_dict(old.state_dict())
    source.weight.data.add_(1.0)
    new.advance(source)
    assert torch.equal(new.model.weight, source.weight) and not new.model.weight.requires_grad


def test_a_second_stage_goes_on_from_the_first(tmp_path) -> None:
    """Heads, student and teacher as they were; the Gram teacher is the first stage's EMA teacher, no random net."""
    first = build("dinov3", DINOV3, teacher_momentum=0.5)
    optimizer = adamw(first)
    for step in range(2):
        train_step(first, optimizer, batch("dinov3", seed=step))
    first.save_pretrained(tmp_path / "ssl")
    second = SSLDINOv3ForPreTraining.from_pretrained(tmp_path, subfolder="ssl", gram_weight=2.0).train()
    mine = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(mine[key], value), key
    for key, value in first.teacher_backbone.state_dict().items():
        assert torch.equal(mine[f"gram.model.{key}"], value), key
    assert int(second.gram.steps) == 0 and second(**batch("dinov3")).metrics["gram_loss"] > 0


def test_schedules_are_constant_and_prototypes_plain() -> None:
    model = build("dinov3", DINOV3)
    assert model.teacher_momentum(0.0) == model.teacher_momentum(1.0) == 0.994
    assert [name for name, _ in model.head.last_layer.named_parameters()] == ["weight"]
    assert not hasattr(model, "center") and not hasattr(model, "gram")
    assert model.head.last_layer.out_features == 12 and model.patch_head.last_layer.out_features == 10
    assert SSLDINOv3ImageProcessor().model_input_names == ["pixel_values", "local_pixel_values"]
    views = processor("dinov3", **CROPS)(pictures(2), seed=0)
    assert views["gram_pixel_values"].shape == (2, 2, 3, 32, 32)
