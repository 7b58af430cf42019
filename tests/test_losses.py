import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.losses import contrastive_logits, info_nce, info_nce_logits, negative_cosine, nt_xent, spread


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def info_nce_by_hand(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> float:
    """Every query: its own key against itself and all negatives; the other queries' keys take no part."""
    losses = []
    for query, key in zip(queries, keys):
        own = float(query @ key) / temperature
        others = [math.exp(float(query @ negative) / temperature) for negative in negatives]
        losses.append(-own + math.log(math.exp(own) + sum(others)))
    return sum(losses) / len(losses)


def test_info_nce_by_hand() -> None:
    queries, keys, negatives = unit(3, 4), unit(3, 4), unit(5, 4)
    loss, accuracy = info_nce(queries, keys, negatives, 0.2)
    assert float(loss) == pytest.approx(info_nce_by_hand(queries, keys, negatives, 0.2), rel=1e-5)
    logits = info_nce_logits(queries, keys, negatives, 0.2)
    assert logits.shape == (3, 6)
    assert float(accuracy) == pytest.approx(sum(float(row[0] == row.max()) for row in logits) / 3)


def test_info_nce_accuracy_and_chance() -> None:
    axes = torch.eye(4)
    assert info_nce(axes[:2], axes[:2], axes[2:], 0.1)[1] == 1
    assert info_nce(axes[:2], axes[2:], axes[:2], 0.1)[1] == 0
    loss, _ = info_nce(unit(16, 8), unit(16, 8), unit(255, 8), 1000.0)
    assert float(loss) == pytest.approx(math.log(256), abs=0.01)


def test_info_nce_gradient_reaches_the_queries_by_the_softmax() -> None:
    queries, keys, negatives = unit(2, 3).requires_grad_(), unit(2, 3), unit(4, 3)
    info_nce(queries, keys, negatives, 0.5)[0].backward()
    for row, (query, key) in enumerate(zip(queries.detach(), keys)):
        candidates = torch.cat([key[None], negatives])
        weights = (candidates @ query / 0.5).softmax(0)
        wanted = (weights @ candidates - key) / 0.5 / 2
        torch.testing.assert_close(queries.grad[row], wanted)


def test_info_nce_is_float32_under_autocast() -> None:
    queries, keys, negatives = unit(4, 8), unit(4, 8), unit(16, 8)
    exact = info_nce(queries, keys, negatives, 0.07)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(queries, keys, negatives, 0.07)[0], exact)


def test_memory_adds_negatives_to_nt_xent() -> None:
    first, second, memory = unit(3, 4), unit(3, 4), unit(5, 4)
    logits, positive = contrastive_logits(first, second, 0.5, memory=memory)
    plain, same = contrastive_logits(first, second, 0.5)
    assert logits.shape == (6, 11) and torch.equal(positive, same)
    torch.testing.assert_close(logits[:, :6], plain)
    torch.testing.assert_close(logits[:, 6:], torch.cat([first, second]) @ memory.T / 0.5)
    loss = nt_xent(first, second, 0.5, memory=memory)[0]
    torch.testing.assert_close(loss, (logits.logsumexp(1) - logits.gather(1, positive[:, None])[:, 0]).mean())
    assert loss > nt_xent(first, second, 0.5)[0]


def test_negative_cosine_by_hand() -> None:
    predictions, targets = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert float(negative_cosine(predictions, targets)) == pytest.approx(-(0.6 + 1) / 2)
    assert float(negative_cosine(7 * predictions, targets / 3)) == pytest.approx(-(0.6 + 1) / 2)


def test_negative_cosine_is_half_a_distance_and_passes_gradients_to_both() -> None:
    predictions, targets = (torch.randn(5, 6).requires_grad_() for _ in range(2))
    loss = negative_cosine(predictions, targets)
    apart = F.normalize(predictions, dim=1) - F.normalize(targets, dim=1)
    assert float(2 + 2 * loss) == pytest.approx(float(apart.square().sum(1).mean()), rel=1e-5)
    loss.backward()
    for rows, other in ((predictions, targets), (targets, predictions)):  # −(ẑ − cos · p̂) / ‖p‖, by hand
        unit, wanted = F.normalize(rows, dim=1), F.normalize(other, dim=1)
        cosine = (unit * wanted).sum(1, keepdim=True)
        by_hand = -(wanted - cosine * unit) / rows.norm(dim=1, keepdim=True) / 5
        torch.testing.assert_close(rows.grad, by_hand.detach())


def test_negative_cosine_is_float32_under_autocast_and_finite_at_zero() -> None:
    predictions, targets = torch.randn(2, 5, 6)
    exact = negative_cosine(predictions, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(negative_cosine(predictions, targets), exact)
        assert negative_cosine(predictions.bfloat16(), targets).dtype == torch.float32
    nothing = torch.zeros(2, 4).requires_grad_()
    negative_cosine(nothing, torch.ones(2, 4)).backward()
    assert nothing.grad.isfinite().all()


def test_spread_tells_everywhere_from_one_direction() -> None:
    assert float(spread(torch.randn(4000, 16))) == pytest.approx(1.0, abs=0.02)
    assert float(spread(torch.ones(50, 16) + 1e-4 * torch.randn(50, 16))) < 1e-3
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])  # normalised: ±.5 about .5 in both channels
    assert float(spread(rows)) == pytest.approx(0.5 * 2**0.5)
