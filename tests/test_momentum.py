import pytest
import torch
from torch import nn

from hf_ssl import momentum


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_teacher_is_a_frozen_copy_that_shares_nothing() -> None:
    model = student()
    teacher = momentum.make_teacher(model)
    assert all(not p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.add_(1.0)
    assert not torch.equal(teacher[0].weight, model[0].weight)
    assert not torch.equal(teacher[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("m", [0.0, 0.75, 1.0, torch.tensor(0.75)])
def test_ema_by_hand_parameters_only(m) -> None:
    model, teacher = student(), student()
    wanted = [float(m) * t + (1 - float(m)) * s for t, s in zip(teacher.parameters(), model.parameters(), strict=True)]
    model[1].running_mean.fill_(5.0)
    momentum.ema_update(model, teacher, m)
    torch.testing.assert_close([p.data for p in teacher.parameters()], [w.data for w in wanted])
    assert not teacher[1].running_mean.any()  # the teacher owns its statistics


def test_ema_of_buffers_averages_statistics_and_copies_counters() -> None:
    model, teacher = student(), student()
    model[1].running_mean.fill_(4.0)
    model[1].running_var.fill_(3.0)
    model[1].num_batches_tracked.fill_(7)
    momentum.ema_update(model, teacher, 0.75, buffers=True)
    assert torch.equal(teacher[1].running_mean, torch.full((4,), 1.0))  # ¾ · 0 + ¼ · 4
    assert torch.equal(teacher[1].running_var, torch.full((4,), 1.5))  # ¾ · 1 + ¼ · 3
    assert teacher[1].num_batches_tracked == 7 and teacher[1].num_batches_tracked.dtype == torch.int64
    momentum.ema_update(model, teacher, 0.0, buffers=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in teacher.state_dict().items())


def test_ema_of_another_precision() -> None:
    model, teacher = student(), student()
    want = 0.5 * teacher[0].weight.detach() + 0.5 * model[0].weight.detach().bfloat16().float()
    momentum.ema_update(model.bfloat16(), teacher, 0.5)
    torch.testing.assert_close(teacher[0].weight.detach(), want)


def test_ema_of_different_models_is_an_error() -> None:
    with pytest.raises(ValueError):
        momentum.ema_update(nn.Sequential(student(), nn.Linear(2, 2)), student(), 0.5)
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.5))  # as many parameters, no statistics
    momentum.ema_update(plain, student(), 0.5)
    with pytest.raises(ValueError):
        momentum.ema_update(plain, student(), 0.5, buffers=True)


def test_copy_state_spares_what_a_checkpoint_filled() -> None:
    model, teacher = student(), student()
    loaded = teacher[0].bias.detach().clone()
    teacher[0].bias._is_hf_initialized = True
    model[1].running_var.fill_(3.0)
    momentum.copy_state(model, teacher)
    assert torch.equal(teacher[0].weight, model[0].weight) and torch.equal(teacher[0].bias, loaded)
    assert torch.equal(teacher[1].running_var, model[1].running_var)


def test_teacher_mode_keeps_dropout_off_and_batchnorm_with_the_student() -> None:
    teacher = student()
    momentum.teacher_mode(teacher, True)
    assert teacher[1].training and not teacher[2].training and not teacher[0].weight.requires_grad
    momentum.teacher_mode(teacher, False)
    assert not teacher[1].training
