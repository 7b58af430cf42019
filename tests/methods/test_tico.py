import pytest
import torch
import torch.nn.functional as F

from tests.contract.tiny import RESNET, batch, build, students
from tests.invariants import test_collapse as small

HEADS = {"projection_dim": 64, "hidden_dim": 64, "teacher_momentum": 0.9}


def by_hand(student, teacher, covariance, rho: float) -> float:
    """−mean z₁·z₂ + ρ · mean Σᵢⱼ z₁ᵢ Cᵢⱼ z₁ⱼ, a number at a time."""
    total, width = 0.0, student.shape[1]
    for a, b in zip(student, teacher, strict=True):
        a, b = a / a.norm(), b / b.norm()
        total -= float(a @ b)
        total += rho * sum(float(a[i] * covariance[i, j] * a[j]) for i in range(width) for j in range(width))
    return total / len(student)


def test_loss_by_hand_over_three_steps() -> None:
    """C_t = β·C_{t−1} + (1 − β)·mean z₁z₁ᵀ, from zero, and the loss uses C_t."""
    model, covariance = build("tico"), torch.zeros(8, 8)
    for _ in range(3):
        student, teacher = torch.randn(2, 6, 8)
        unit = F.normalize(student, dim=1)
        covariance = 0.9 * covariance + 0.1 * sum(torch.outer(row, row) for row in unit) / 6
        loss, agreement, contrast = model.contrast(student, teacher)
        assert float(loss) == pytest.approx(by_hand(student, teacher, covariance, 8.0), rel=1e-4)
        assert float(loss) == pytest.approx(float(8.0 * contrast - agreement), rel=1e-5)
        model.update_state()
        torch.testing.assert_close(model.covariance.value.view(8, 8), covariance)


def test_the_covariance_is_a_constant_in_the_gradient() -> None:
    """lightly#1484: with a gradient through this batch's part of C, that part would count twice."""
    model = build("tico", covariance_momentum=0.0)  # C is this batch's alone
    student, teacher = torch.randn(6, 8).requires_grad_(), torch.randn(6, 8)
    model.contrast(student, teacher)[0].backward()
    leaf = student.detach().clone().requires_grad_()
    unit = F.normalize(leaf, dim=1)
    fixed = (unit.T @ unit / 6).detach()
    by_rows = [
        8.0 * row @ fixed @ row - row @ other for row, other in zip(unit, F.normalize(teacher, dim=1), strict=True)
    ]
    (sum(by_rows) / 6).backward()
    torch.testing.assert_close(student.grad, leaf.grad)


def test_the_whole_step_is_what_the_paper_draws() -> None:
    model, twin = build("tico", RESNET), build("tico", RESNET)
    views = batch("tico")["pixel_values"]
    with torch.no_grad():
        student = twin.projector(twin.features(views[:, 0]))
        teacher = twin.teach(views[:, 1:])
    unit = F.normalize(student, dim=1)
    output = model(views)
    assert float(output.loss) == pytest.approx(by_hand(student, teacher, 0.1 * unit.T @ unit / 4, 8.0), rel=1e-4)
    assert len(output.embeddings) == 4
    torch.testing.assert_close(
        dict(model.teacher_projector.named_buffers()), dict(twin.teacher_projector.named_buffers())
    )


def test_the_covariance_moves_once_per_optimiser_step() -> None:
    """lightly-train#968: two micro-batches count as their mean, and only in training."""
    model, parts = build("tico"), [torch.randn(4, 8), torch.randn(4, 8)]
    for part in parts:
        model.contrast(part, part)
        assert not model.covariance.value.any()
    model.eval()
    model.contrast(parts[0], parts[0])
    model.train().update_state()
    units = F.normalize(torch.cat(parts), dim=1)
    torch.testing.assert_close(model.covariance.value.view(8, 8), 0.1 * units.T @ units / 8)


def test_the_teacher_has_no_part_in_the_gradient() -> None:
    model = build("tico")
    model(**batch("tico")).loss.backward()
    trained = students(model)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def test_the_covariance_is_float32_under_autocast() -> None:
    model, (student, teacher) = build("tico"), torch.randn(2, 6, 8)
    exact = model.contrast(student, teacher)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.contrast(student, teacher)[0], exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_embeddings_stay_spread(seed: int) -> None:
    model, logged = small.train("tico", seed, small.RESNET, **HEADS)
    spread, rank = small.health(model)
    assert spread > 0.5 and rank > 28
    assert logged[-1]["spread"] > 0.7 and logged[-1]["covariance"] < 0.2


def test_without_the_covariance_it_collapses() -> None:
    _, logged = small.train("tico", 0, small.RESNET, **HEADS, covariance_weight=0.0)
    assert logged[-1]["spread"] < 0.2 and logged[-1]["covariance"] > 0.9  # one direction has it all
