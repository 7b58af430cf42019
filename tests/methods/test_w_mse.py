import numpy as np
import pytest
import torch

from hf_ssl.methods.joint_embedding.w_mse import WMSEConfig, positive_distance, sub_batches, whiten
from tests.contract.tiny import VIT, batch, build
from tests.invariants.test_collapse import RESNET as WIDE
from tests.invariants.test_collapse import health, train


def by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Cholesky whitening of each view by itself, then the mean squared distance of unit vectors."""
    sides = []
    for rows in (first, second):
        centred = rows - rows.mean(0)
        factor = np.linalg.cholesky(np.cov(centred.T))
        white = (np.linalg.inv(factor) @ centred.T).T
        sides.append(white / np.linalg.norm(white, axis=1, keepdims=True))
    return float(((sides[0] - sides[1]) ** 2).sum(1).mean())


def test_loss_by_hand() -> None:
    torch.manual_seed(0)
    views = torch.randn(2, 9, 4) @ torch.randn(4, 4) + torch.randn(4)
    wanted = by_hand(*views.double().numpy())
    assert float(positive_distance(whiten(views))) == pytest.approx(wanted, rel=1e-4)


def test_whitened_rows_have_the_identity_for_covariance() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 3, 12, 5) @ torch.randn(5, 5) + 7
    white = whiten(rows)
    torch.testing.assert_close(white.mean(-2), torch.zeros(2, 3, 5), rtol=0, atol=1e-4)
    covariance = white.mT @ white / 11
    torch.testing.assert_close(covariance, torch.eye(5).expand(2, 3, 5, 5), rtol=0, atol=1e-3)


def test_each_view_is_whitened_by_itself() -> None:
    """Cholesky whitening undoes a lower-triangular map and a shift; whitened together the views would differ."""
    torch.manual_seed(0)
    first = torch.randn(16, 4)
    second = first @ (torch.randn(4, 4).tril(-1) + 2 * torch.eye(4)).T + 3
    assert float(positive_distance(whiten(torch.stack([first, second])))) == pytest.approx(0, abs=1e-4)


def test_all_pairs_of_views_count_once() -> None:
    torch.manual_seed(0)
    views = torch.randn(4, 6, 3)
    pairs = [positive_distance(views[[i, j]]) for i in range(4) for j in range(i)]
    torch.testing.assert_close(positive_distance(views), torch.stack(pairs).mean())
    euclidean = positive_distance(views[:2], normalise=False)
    torch.testing.assert_close(euclidean, (views[0] - views[1]).square().mean())


def test_a_step_averages_random_splits_of_the_global_batch() -> None:
    model = build("w_mse", sub_batch=4, iterations=1, epsilon=0.2)
    views, losses = batch("w_mse", 8), []
    for step in (0, 0, 1):
        model.step.fill_(step)
        losses.append(float(model(**views).loss.detach()))
    assert losses[0] == losses[1] != losses[2]
    whole = build("w_mse", sub_batch=8, iterations=3, epsilon=0.2)  # one part: the order does not matter
    once = build("w_mse", sub_batch=8, iterations=1, epsilon=0.2)
    torch.testing.assert_close(whole(**views).loss, once(**views).loss, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_split_or_whitened_is_refused_in_words() -> None:
    assert [sub_batches(images, 128) for images in (512, 96, 130, 2)] == [4, 1, 1, 1]
    with pytest.raises(ValueError, match="301 images into 2 equal"):
        sub_batches(301, 128)
    with pytest.raises(ValueError, match="64 images cannot be whitened in 64 dimensions"):
        WMSEConfig(backbone_config=dict(VIT), sub_batch=64, projection_dim=64)
    assert torch.isfinite(whiten(torch.randn(2, 2, 32), 1e-6)).all()  # the few images that precision is measured with


def test_gradient_flows_through_the_whitening() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 8, 3, dtype=torch.float64).float().requires_grad_()
    positive_distance(whiten(rows)).backward()
    probe = torch.zeros(2, 8, 3)
    probe[0, 2, 1] = 1e-2
    up, down = (by_hand(*(rows.detach() + sign * probe).double().numpy()) for sign in (1, -1))
    assert float(rows.grad[0, 2, 1]) == pytest.approx((up - down) / 2e-2, abs=1e-3)


def test_autocast_does_not_touch_the_whitening() -> None:
    rows = torch.randn(16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = whiten(rows)
    assert torch.equal(rough, whiten(rows)) and rough.dtype == torch.float32


def test_a_short_run_spreads_its_embeddings() -> None:
    model, _ = train("w_mse", 0, WIDE, sub_batch=32, epsilon=1e-6)
    spread, rank = health(model)  # seen: 0.78 and 45; untrained 0.30 and 18
    assert spread > 0.5 and rank > 25
