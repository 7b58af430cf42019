import numpy as np
import pytest
import torch
from torch import nn

from hf_ssl.methods.joint_embedding.barlow_twins import barlow_terms, cross_correlation
from tests.contract.tiny import batch, build
from tests.invariants.test_collapse import RESNET as WIDE
from tests.invariants.test_collapse import health, train


def by_hand(first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """Eq. 1 with loops: every entry of the correlation of the two views, each normalised on its own."""
    count, dim = first.shape
    total = 0.0
    for i in range(dim):
        for j in range(dim):
            a, b = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            correlation = (a * b).sum() / count / np.sqrt((a.var() + 1e-5) * (b.var() + 1e-5))
            total += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return total


def test_loss_by_hand() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 5) * torch.rand(5) + torch.randn(2, 1, 5)
    agreement, redundancy = barlow_terms(cross_correlation(first, second))
    wanted = by_hand(first.double().numpy(), second.double().numpy(), 0.0051)
    assert float(agreement + 0.0051 * redundancy) == pytest.approx(wanted, rel=1e-5)


def test_each_view_is_normalised_by_itself() -> None:
    """A view that is another in other units agrees with it fully: statistics of both together would say otherwise."""
    torch.manual_seed(0)
    first = torch.randn(64, 5)
    diagonal = cross_correlation(first, 3 * first + 5).diagonal()
    torch.testing.assert_close(diagonal, torch.ones(5), rtol=0, atol=1e-4)


def test_embeddings_that_do_not_vary_cost_their_dimension() -> None:
    agreement, redundancy = barlow_terms(cross_correlation(torch.ones(4, 7), torch.ones(4, 7)))
    assert (float(agreement), float(redundancy)) == (7.0, 0.0)


def test_objective_weighs_the_terms() -> None:
    model = build("barlow_twins", redundancy_weight=0.25)
    output = model(**batch("barlow_twins"))
    metrics = output.metrics
    assert float(output.loss.detach()) == pytest.approx(
        float(metrics["on_diagonal"] + 0.25 * metrics["off_diagonal"]), rel=1e-6
    )


def test_projector_has_three_linears_without_bias_and_no_last_norm() -> None:
    projector = build("barlow_twins").projector
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(16, 16), (16, 16), (16, 8)]
    assert all(layer.bias is None for layer in linears) and projector[-1] is linears[-1]


def test_biases_learn_at_their_share_of_the_rate() -> None:
    model = build("barlow_twins", bias_gradient_scale=0.5)
    model(**batch("barlow_twins")).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.before_optimizer_step(0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, before[name] * (0.5 if parameter.ndim == 1 else 1.0))


def test_autocast_does_not_touch_the_correlation() -> None:
    first, second = torch.randn(2, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = cross_correlation(first, second)
    assert torch.equal(rough, cross_correlation(first, second))


def test_a_short_run_spreads_and_agrees() -> None:
    model, logged = train("barlow_twins", 0, WIDE)
    spread, rank = health(model)  # seen: 0.77 and 43; untrained 0.30 and 18
    assert spread > 0.5 and rank > 25
    assert logged[-1]["on_diagonal"] < 0.4 * logged[0]["on_diagonal"]  # seen: 5.1 to 0.5
