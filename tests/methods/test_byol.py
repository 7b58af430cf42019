import math

import pytest
import torch
from torch import nn

from hf_ssl.methods.joint_embedding.byol import BYOLConfig, BYOLForPreTraining, byol_loss
from hf_ssl.momentum import ema_update
from tests.contract.tiny import RESNET, batch, build
from tests.invariants import test_collapse as small

HEADS = {"projection_dim": 32, "hidden_dim": 64, "teacher_momentum": 0.9}


def by_hand(predictions, targets) -> float:
    """Both directions, a row at a time: each squared distance of unit vectors lies between 0 and 4."""
    batch, total = len(predictions) // 2, 0.0
    for i in range(batch):
        for one, other in ((i, batch + i), (batch + i, i)):
            p, z = predictions[one] / predictions[one].norm(), targets[other] / targets[other].norm()
            total += float((p - z).square().sum())
    return total / batch


def test_loss_by_hand() -> None:
    predictions, targets = torch.randn(2, 10, 6)
    assert float(byol_loss(predictions, targets)) == pytest.approx(by_hand(predictions, targets), rel=1e-5)
    assert float(byol_loss(3 * predictions, targets / 7)) == pytest.approx(by_hand(predictions, targets), rel=1e-5)


def test_the_loss_is_a_sum_over_both_directions() -> None:
    """4 − 4·cos, not its half or its mean over directions: published learning rates depend on it."""
    first, second = torch.eye(4)[:2], torch.eye(4)[2:]
    agreeing = torch.cat([second, first])
    assert float(byol_loss(torch.cat([first, second]), agreeing)) == pytest.approx(0.0, abs=1e-6)
    assert float(byol_loss(torch.cat([first, second]), -agreeing)) == pytest.approx(8.0)
    assert float(byol_loss(agreeing, agreeing)) == pytest.approx(4.0)  # each view against itself: the wrong pairs


def test_the_whole_step_is_what_the_paper_draws() -> None:
    """Student of both views → predictor, against the teacher's projections of the other view, each view on its own."""
    model, twin = build("byol", RESNET), build("byol", RESNET)
    views = batch("byol")["pixel_values"]
    with torch.no_grad():
        p = torch.cat([twin.predictor(twin.projector(twin.features(view))) for view in views.unbind(1)])
        z = [twin.teacher_projector(pool(twin.teacher_backbone, view)) for view in views.unbind(1)]
    assert float(model(views).loss) == pytest.approx(by_hand(p, torch.cat(z)), rel=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def pool(backbone, view):
    return backbone(view).last_hidden_state.mean((2, 3))


def test_heads_have_batchnorm_inside_and_none_behind() -> None:
    model = build("byol")
    for head, widths in ((model.projector, (16, 16, 8)), (model.predictor, (8, 16, 8))):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert (head[0].in_features, head[0].out_features, head[3].out_features) == widths
        assert head[0].bias is None and head[3].bias is None


def test_defaults_are_the_papers() -> None:
    config = BYOLConfig(backbone_config=dict(RESNET))
    assert (config.hidden_dim, config.projection_dim, config.joint_batchnorm) == (4096, 256, False)
    first, second = BYOLForPreTraining.processor_class().views
    assert (first["blur_p"], second["blur_p"], second["solarize_p"]) == (1.0, 0.1, 0.2)
    assert "solarize_p" not in first and first["scale"] == [0.08, 1.0]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_momentum_are_the_student_and_the_first_teacher(momentum: float) -> None:
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
    kept = [p.clone() for p in (student if momentum == 0 else teacher).parameters()]
    ema_update(student, teacher, momentum)
    for now, wanted in zip(teacher.parameters(), kept, strict=True):
        torch.testing.assert_close(now, wanted)


# --- collapse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_embeddings_stay_spread(seed: int) -> None:
    model, logged = small.train("byol", seed, small.RESNET, **HEADS)
    spread, rank = small.health(model)
    assert spread > 0.5 and rank > 28
    assert logged[-1]["loss"] < 0.6 * logged[0]["loss"] and logged[-1]["target_spread"] > 0.4


def test_without_its_predictor_it_collapses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the predictor is for, and proof that the measures above see a collapse."""
    monkeypatch.setattr(BYOLForPreTraining, "predictor", nn.Identity(), raising=False)
    _, logged = small.train("byol", 0, small.RESNET, **HEADS)
    assert logged[-1]["target_spread"] < 0.2 and math.isclose(logged[-1]["loss"], 0.0, abs_tol=0.2)
