import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.methods.joint_embedding.nnclr import NNCLRConfig, nearest, neighbour_nce
from tests.contract.tiny import VIT, adamw, batch, build, train_step


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_by_hand() -> None:
    neighbours, predictions = unit(3, 4), torch.randn(3, 4)
    loss, accuracy = neighbour_nce(neighbours, predictions, 0.2)
    p = [v / v.norm() for v in predictions]
    losses = []
    for i, neighbour in enumerate(neighbours):
        scores = [math.exp(float(neighbour @ v) / 0.2) for v in p]
        losses.append(-math.log(scores[i] / sum(scores)))
    assert float(loss) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert 0 <= accuracy <= 1


def test_neighbours_come_from_the_queue_and_carry_no_gradient() -> None:
    model = build("nnclr", temperature=0.5)
    projected, predicted = torch.randn(8, 8).requires_grad_(), torch.randn(8, 8).requires_grad_()
    support = model.queue.rows.clone()
    loss, metrics = model.compare(projected, predicted)
    loss.backward()
    assert projected.grad is None and predicted.grad.abs().sum() > 0
    rows = F.normalize(projected.detach(), dim=1)
    places = [max(range(24), key=lambda i, row=row: float(row @ support[i])) for row in rows]
    assert nearest(rows, support).tolist() == places
    wanted = [neighbour_nce(support[places[:4]], predicted[4:], 0.5)[0],
              neighbour_nce(support[places[4:]], predicted[:4], 0.5)[0]]  # fmt: skip
    torch.testing.assert_close(loss, sum(wanted) / 2)
    same = sum(a == b for a, b in zip(places[:4], places[4:]))
    assert float(metrics["neighbour_agreement"]) == pytest.approx(same / 4)


def test_in_batch_negatives_are_predictions_and_nothing_else() -> None:
    """With neighbours orthogonal to all predictions but their own, the loss depends on no projection of the batch."""
    basis = torch.eye(6)
    loss, accuracy = neighbour_nce(basis[:3], basis[:3], 1.0)
    assert float(loss) == pytest.approx(math.log(math.e + 2) - 1, rel=1e-5) and accuracy == 1  # 3 candidates, not 5


def test_the_queue_is_first_in_first_out_and_moves_once_per_step() -> None:
    model = build("nnclr", queue_size=6)
    after, first = model.queue.rows.clone(), []
    for _ in range(2):
        projected = torch.randn(8, 8)
        model.compare(projected, torch.randn(8, 8))
        assert torch.equal(model.queue.rows, after)  # not before the optimiser step
        model.after_optimizer_step()
        first.append(F.normalize(projected[:4], dim=1))  # of the first view, unit vectors
        after = model.queue.rows.clone()
    torch.testing.assert_close(after, torch.cat([first[1][2:], first[0][2:], first[1][:2]]))
    assert int(model.queue.pointer) == 2 and int(model.queue.filled) == 6


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    model = build("nnclr", queue_size=3)
    projected = torch.randn(10, 8)
    model.compare(projected, torch.randn(10, 8))
    model.after_optimizer_step()
    wanted = F.normalize(projected[2:5], dim=1)
    assert {tuple(row) for row in model.queue.rows.tolist()} == {tuple(row) for row in wanted.tolist()}


def test_evaluation_leaves_the_queue_alone() -> None:
    model, views = build("nnclr").eval(), batch("nnclr")
    before = model.queue.rows.clone()
    model(**views)
    model.after_optimizer_step()
    assert torch.equal(model.queue.rows, before)


def test_heads() -> None:
    model = build("nnclr")
    assert [type(m).__name__[:5] for m in model.projector] == ["Linea", "Batch", "ReLU"] * 2 + ["Linea", "Batch"]
    assert [tuple(m.weight.shape) for m in model.projector if isinstance(m, nn.Linear)] == [
        (16, 16),
        (16, 16),
        (8, 16),
    ]
    assert [type(m).__name__[:5] for m in model.predictor] == ["Linea", "Batch", "ReLU", "Linea"]


def test_neighbours_become_real_ones() -> None:
    """After a few steps the queue holds features and the neighbours are near."""
    model = build("nnclr")
    optimizer = adamw(model)
    first = model(**batch("nnclr", 8)).metrics["neighbour_similarity"]
    for seed in range(8):
        train_step(model, optimizer, batch("nnclr", 8, seed=seed))
    assert model(**batch("nnclr", 8)).metrics["neighbour_similarity"] > first


def test_bad_values_are_refused() -> None:
    for field, words in {"temperature": "must be positive", "queue_size": "must be at least 1"}.items():
        with pytest.raises(ValueError, match=f"{field} {words}, got 0"):
            NNCLRConfig(backbone_config=dict(VIT), **{field: 0})
