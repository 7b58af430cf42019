import math

import pytest
import torch
import torch.nn.functional as F

from hf_ssl import distributed
from tests.contract.tiny import RESNET, adamw, batch, build, train_step


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def scaled_by_hand(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    q = (scores.double() / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * q.shape[0]).float()


def test_loss_by_hand() -> None:
    """Two assigned crops, each predicted by the other three: the mean over crops of the mean over predictions."""
    model = build("swav", queue_size=0, temperature=0.2)
    rows = unit(4, 5, 8)
    loss, _ = model.learn(rows)
    scores = rows @ model.prototypes[0].weight.T
    total, scores = 0.0, scores.detach()
    for assigned in range(2):
        q = scaled_by_hand(scores[assigned], 0.05, 3)
        others = [crop for crop in range(4) if crop != assigned]
        total += sum(-float((q * (scores[v] / 0.2).log_softmax(1)).sum(1).mean()) for v in others) / len(others)
    assert float(loss) == pytest.approx(total / 2, rel=1e-4)


def test_assignments_carry_no_gradient_and_are_equal_shares() -> None:
    model = build("swav", queue_size=0, sinkhorn_iterations=50)
    scores = model.prototypes[0](unit(2, 12, 8))
    targets = model.assign(scores)
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(2), torch.ones(2, 12))
    torch.testing.assert_close(targets.sum(1), torch.full((2, 6), 2.0), rtol=1e-2, atol=1e-2)


def test_queue_joins_in_only_once_it_is_full() -> None:
    """Twelve places, four images a step: the first three steps assign within the batch alone, the fourth with it."""
    model = build("swav", queue_size=12)
    for step in range(5):
        rows = unit(3, 4, 8)
        scores = model.prototypes[0](rows[:2])
        alone = torch.stack([distributed.sinkhorn(crop, 0.05, 3) for crop in scores])
        assert torch.allclose(model.assign(scores), alone, atol=1e-6) == (step < 3)
        model.learn(rows)
        model.update_state()


def test_queue_waits_for_its_share_of_the_run() -> None:
    model = build("swav", queue_size=12, queue_start=0.5)
    model.total_steps.fill_(10)
    scores = model.prototypes[0](unit(2, 4, 8))
    alone = model.assign(scores)
    model.queue.filled.fill_(12)
    assert torch.equal(model.assign(scores), alone)
    model.step.fill_(5)
    assert not torch.allclose(model.assign(scores), alone, atol=1e-6)


def test_queue_holds_the_embeddings_of_the_large_crops_by_crop() -> None:
    """lightly#1294 fed it another tensor. The embeddings are kept and scored anew by the prototypes of today."""
    model = build("swav", queue_size=4)
    rows = unit(3, 4, 8)
    model.learn(rows)
    model.queue.advance()
    assert torch.equal(model.queue.rows, torch.cat([rows[0], rows[1]], dim=1))
    with torch.no_grad():
        model.prototypes[0].weight.copy_(unit(6, 8))
    scores = model.prototypes[0](unit(2, 4, 8))
    wanted = [scaled_by_hand(torch.cat([scores[i], model.prototypes[0](rows[i])]), 0.05, 3)[:4] for i in range(2)]
    torch.testing.assert_close(model.assign(scores), torch.stack(wanted), rtol=1e-4, atol=1e-6)


def test_evaluating_leaves_the_queue_alone() -> None:
    model = build("swav").eval()
    model(**batch("swav"))
    model.update_state()
    assert model.queue.filled == 0


def test_prototypes_stay_unit_vectors() -> None:
    """solo-learn 16183cf trained their norms: from the start and after every step they are 1."""
    model = build("swav", freeze_prototypes=0.0)
    optimizer = adamw(model)
    for step in range(3):
        torch.testing.assert_close(model.prototypes[0].weight.norm(dim=1), torch.ones(6))
        before = model.prototypes[0].weight.detach().clone()
        train_step(model, optimizer, batch("swav", seed=step))
        assert not torch.equal(model.prototypes[0].weight, before)
    torch.testing.assert_close(model.prototypes[0].weight.norm(dim=1), torch.ones(6))


def test_prototypes_are_frozen_at_first() -> None:
    model = build("swav", freeze_prototypes=0.2)
    for progress, frozen in ((0.0, True), (0.19, True), (0.2, False)):
        model.zero_grad()
        model(**batch("swav")).loss.backward()
        model.before_optimizer_step(progress)
        assert (model.prototypes[0].weight.grad is None) == frozen
        assert model.projector[0].weight.grad is not None


def test_embeddings_are_unit_vectors_before_the_prototypes() -> None:
    model = build("swav")
    seen = []
    model.prototypes[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**batch("swav"))
    torch.testing.assert_close(seen[0].norm(dim=2), torch.ones(4, 4))  # two large, two small crops


def test_small_crops_predict_but_are_not_assigned() -> None:
    model = build("swav", queue_size=0)
    rows = unit(4, 5, 8)
    targets = []
    model.assign = lambda scores: targets.append(scores) or torch.full_like(scores, 1 / 6)
    model.learn(rows)
    torch.testing.assert_close(targets[0], rows[:2] @ model.prototypes[0].weight.T)


def test_even_scores_are_chance() -> None:
    model = build("swav", queue_size=0, temperature=100.0)
    loss, metrics = model.learn(unit(4, 50, 8))
    assert float(loss) == pytest.approx(math.log(6), abs=0.01)
    assert 0 < float(metrics["assignment_entropy"]) < math.log(6)
    assert float(metrics["prototype_entropy"]) == pytest.approx(math.log(6), abs=0.1)


@pytest.mark.parametrize(("fields", "word"), [
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"assigned_crops": 3}, "assigned_crops must be 1 or 2"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build("swav", **fields)


def test_batchnorm_of_crops_together_or_apart() -> None:
    views = batch("swav")
    losses = [float(build("swav", RESNET, joint_batchnorm=kind)(**views).loss.detach()) for kind in (True, False)]
    assert abs(losses[0] - losses[1]) > 1e-4
