import math

import pytest
import torch
import torch.nn.functional as F

from hf_ssl.methods.joint_embedding.ressl import ReSSLConfig, ReSSLForPreTraining
from tests.contract.tiny import RESNET, VIT, batch, build, processor
from tests.invariants import test_collapse as small


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def by_hand(queries, keys, images, student: float, teacher: float) -> float:
    """−Σ p log q over the queue, a row at a time."""
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        p = [math.exp(float(key @ image) / teacher) for image in images]
        q = [math.exp(float(query @ image) / student) for image in images]
        total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
    return total / len(queries)


def test_loss_by_hand() -> None:
    model = build("ressl")
    queries, keys = unit(5, 8), unit(5, 8)
    loss, metrics = model.relate(queries, keys)
    assert float(loss) == pytest.approx(by_hand(queries, keys, model.queue.rows, 0.1, 0.04), rel=1e-5)
    assert 0 < metrics["relation_entropy"] < math.log(24) and 0 <= metrics["relation_agreement"] <= 1


def test_the_teacher_is_the_sharper_one() -> None:
    """A third-party port has the two temperatures the other way round; the target's entropy tells."""
    config = ReSSLConfig(backbone_config=dict(VIT))
    assert (config.temperature, config.teacher_temperature) == (0.1, 0.04)
    model, keys = build("ressl"), unit(64, 8)
    sharp = model.relate(keys, keys)[1]["relation_entropy"]
    model.config.teacher_temperature = 0.1
    assert sharp < model.relate(keys, keys)[1]["relation_entropy"] - 0.3


def test_the_whole_step_is_what_the_paper_draws() -> None:
    """The first view is the student's, the second the teacher's; both against the queue before this batch."""
    model, twin = build("ressl"), build("ressl")
    views, queue = batch("ressl")["pixel_values"], model.queue.rows.clone()
    with torch.no_grad():
        queries = F.normalize(twin.projector(twin.features(views[:, 0])), dim=1)
        keys = F.normalize(twin.teacher_projector(twin.teacher_backbone(views[:, 1]).last_hidden_state[:, 0]), dim=1)
    output = model(views)
    assert float(output.loss) == pytest.approx(by_hand(queries, keys, queue, 0.1, 0.04), rel=1e-4)
    assert len(output.embeddings) == 4 and torch.equal(model.queue.rows, queue)
    model.after_optimizer_step()
    torch.testing.assert_close(model.queue.rows[:4], keys)
    assert torch.equal(model.queue.rows[4:], queue[4:])


def test_no_gradient_reaches_the_target() -> None:
    queries, keys = unit(5, 8).requires_grad_(), unit(5, 8).requires_grad_()
    model = build("ressl")
    model.relate(queries, keys)[0].backward()
    wanted = F.softmax(queries / 1 @ model.queue.rows.T / 0.1, 1) - F.softmax(keys @ model.queue.rows.T / 0.04, 1)
    torch.testing.assert_close(queries.grad, (wanted @ model.queue.rows / 0.1 / 5).detach())
    model = build("ressl")
    model(**batch("ressl")).loss.backward()
    assert all(p.grad is None for _, teacher in model.teachers() for p in teacher.parameters())


def test_the_momentum_is_constant() -> None:
    assert [build("ressl").teacher_momentum(progress) for progress in (0.0, 0.5, 1.0)] == [0.9] * 3


def test_the_teachers_view_keeps_its_colours() -> None:
    """Also where colours are set for all views, as recipes do."""
    student, teacher = processor("ressl", brightness=0.5, hue=0.1).views
    assert student["jitter_p"] == 0.8 and teacher["jitter_p"] == 0.0
    assert not teacher.get("blur_p") and not teacher.get("grayscale_p") and teacher["hflip"] == 0.5


def test_batchnorm_cannot_sign_the_batch() -> None:
    """moco#46: a key depends on its own picture alone, whatever else is in the batch."""
    model, views = build("ressl", RESNET), batch("ressl", 8)["pixel_values"][:, 1:]
    model(**batch("ressl"))
    model.after_optimizer_step()
    torch.testing.assert_close(model.teach(views)[:4], model.teach(views[:4]))


@pytest.mark.parametrize("field", ["temperature", "teacher_temperature"])
def test_temperatures_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        ReSSLConfig(backbone_config=dict(VIT), **{field: 0.0})


SMALL = {"projection_dim": 32, "hidden_dim": 64, "teacher_momentum": 0.9, "queue_size": 1024}


@pytest.mark.parametrize("seed", [0, 1])
def test_relations_stay_told_apart(seed: int) -> None:
    model, logged = small.train("ressl", seed, small.RESNET, **SMALL)
    spread, rank = small.health(model)
    assert spread > 0.5 and rank > 28
    assert logged[-1]["relation_entropy"] < 0.9 * math.log(1024)  # seen: .84 and .86


def test_without_a_sharper_teacher_all_images_are_alike() -> None:
    """Equal temperatures: the uniform relation is where it ends (the paper's ablation of the teacher's)."""
    _, logged = small.train("ressl", 0, small.RESNET, **SMALL, teacher_temperature=0.1)
    assert logged[-1]["relation_entropy"] > 0.998 * math.log(1024)


def test_it_stands_on_the_contrastive_floor() -> None:
    model = ReSSLForPreTraining(ReSSLConfig(backbone_config=dict(VIT), queue_size=16))
    assert (model.projector[0].out_features, model.projector[-1].out_features) == (4096, 512)
