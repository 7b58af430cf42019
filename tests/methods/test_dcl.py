import math

import pytest
import torch
from torch import Tensor

from hf_ssl.losses import nt_xent
from hf_ssl.methods.joint_embedding.dcl import DCLConfig, dcl
from tests.contract.tiny import VIT, batch, build


def by_hand(first: Tensor, second: Tensor, temperature: float, sigma: float | None = None) -> list[float]:
    z = [v / v.norm() for v in (*first, *second)]
    n, losses = len(first), []
    pulls = [math.exp(float(z[i] @ z[i + n]) / sigma) if sigma else 1.0 for i in range(n)]
    for i in range(2 * n):
        weight = 2 - n * pulls[i % n] / sum(pulls) if sigma else 1.0
        others = [math.exp(float(z[i] @ z[j]) / temperature) for j in range(2 * n) if j % n != i % n]
        losses.append(-weight * float(z[i] @ z[(i + n) % (2 * n)]) / temperature + math.log(sum(others)))
    return losses


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_by_hand(sigma: float | None) -> None:
    first, second = torch.randn(2, 5, 4)
    losses, accuracy = dcl(first, 3 * second, 0.2, sigma)
    torch.testing.assert_close(losses, torch.tensor(by_hand(first, second, 0.2, sigma)), rtol=1e-4, atol=1e-5)
    assert 0 <= accuracy <= 1


def test_negatives_of_both_views_are_one_sum() -> None:
    """lightly#1827 added the two views' logsumexps; one image's negatives at similarity 0 give ln(2·(B − 1))."""
    first = torch.eye(8)[:4]
    losses, accuracy = dcl(first, first, 1.0)
    torch.testing.assert_close(losses, torch.full((8,), math.log(6) - 1))
    assert accuracy == 1


def test_the_positive_is_not_in_the_denominator() -> None:
    """Taken out of NT-Xent's sum by hand, it leaves this loss."""
    first, second = torch.randn(2, 6, 8)
    losses, _ = dcl(first, second, 0.5)
    mean, _ = nt_xent(first, second, 0.5)
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    positive = (z[:6] * z[6:]).sum(1).repeat(2) / 0.5
    everyone = torch.logsumexp(torch.stack([losses + positive, positive]), dim=0) - positive
    torch.testing.assert_close(everyone.mean(), mean)
    assert (losses < everyone).all()


def test_weights_carry_no_gradient_and_average_to_one() -> None:
    first, second = torch.randn(2, 4, 6)
    first.requires_grad_()
    weighted = torch.autograd.grad(dcl(first, second, 0.3, 0.5)[0].mean(), first)[0]
    pulls = (torch.nn.functional.cosine_similarity(first, second) / 0.5).softmax(0).detach()
    weights = (2 - 4 * pulls).repeat(2)
    assert float(weights.mean()) == pytest.approx(1.0)
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    positive = (z * z.roll(4, 0)).sum(1) / 0.3
    plain, _ = dcl(first, second, 0.3)
    wanted = torch.autograd.grad((plain + (1 - weights) * positive).mean(), first)[0]
    torch.testing.assert_close(weighted, wanted)


def test_the_model_takes_either_loss() -> None:
    views = batch("dcl")
    plain, weighted = (build("dcl", weighted=kind)(**views).loss for kind in (False, True))
    assert plain.isfinite() and weighted.isfinite() and plain != weighted


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        DCLConfig(backbone_config=dict(VIT), sigma=0)
    with pytest.raises(ValueError, match="no negatives"):
        dcl(torch.randn(1, 4), torch.randn(1, 4), 0.1)
