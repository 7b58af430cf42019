import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_ssl import distributed
from hf_ssl.losses import variance_and_covariance, vicreg_terms
from tests.contract.tiny import batch, build
from tests.invariants.test_collapse import RESNET as WIDE
from tests.invariants.test_collapse import health, train


def by_hand(rows: np.ndarray) -> tuple[float, float]:
    """The hinge and the covariance penalty of one view, with loops."""
    count, dim = rows.shape
    hinge = covariance = 0.0
    for i in range(dim):
        a = rows[:, i] - rows[:, i].mean()
        hinge += max(0.0, 1 - np.sqrt((a**2).sum() / (count - 1) + 1e-4)) / dim
        for j in range(dim):
            b = rows[:, j] - rows[:, j].mean()
            covariance += 0.0 if i == j else ((a * b).sum() / (count - 1)) ** 2 / dim
    return hinge, covariance


def test_terms_by_hand() -> None:
    torch.manual_seed(0)
    first, second = 0.7 * torch.randn(2, 6, 5) + torch.randn(2, 1, 5)
    invariance, variance, covariance = vicreg_terms(first, second)
    (v1, c1), (v2, c2) = by_hand(first.double().numpy()), by_hand(second.double().numpy())
    assert float(invariance) == pytest.approx(float((first - second).square().sum()) / 30, rel=1e-5)
    assert float(variance) == pytest.approx((v1 + v2) / 2, rel=1e-5)  # the official mean, where the paper adds
    assert float(covariance) == pytest.approx(c1 + c2, rel=1e-5)


def test_places_are_regularised_each_by_itself() -> None:
    torch.manual_seed(0)
    maps = 0.5 * torch.randn(6, 3, 4)
    got = variance_and_covariance(maps)
    each = [variance_and_covariance(maps[:, place]) for place in range(3)]
    for value, parts in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(parts).mean())


def test_a_shift_of_one_view_is_seen_by_invariance_alone() -> None:
    """Centring is for the covariance: views centred before they are compared would hide the shift."""
    torch.manual_seed(0)
    first = torch.randn(8, 4)
    terms, shifted = vicreg_terms(first, first), vicreg_terms(first, first + 2)
    assert float(terms[0]) == 0 and float(shifted[0]) == pytest.approx(4.0)
    torch.testing.assert_close(terms[1:], shifted[1:])


def test_the_mean_is_that_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks whose rows lie elsewhere: centring each rank's rows before the gather would lose half of the variance."""
    torch.manual_seed(0)
    mine, theirs = torch.randn(4, 3) / 4, torch.randn(4, 3) / 4 + 1
    whole = variance_and_covariance(torch.cat([mine, theirs]))

    def gather(rows: Tensor) -> Tensor:
        return torch.cat([rows, theirs])

    monkeypatch.setattr(distributed, "gather_with_grad", gather)
    torch.testing.assert_close(variance_and_covariance(mine), whole)


def test_the_hinge_lets_go_at_one() -> None:
    wide, still = torch.tensor([[-2.0], [2.0]]), torch.ones(4, 3)
    assert float(variance_and_covariance(wide)[0]) == 0
    assert float(variance_and_covariance(still)[0]) == pytest.approx(0.99)  # 1 − √1e-4


def test_one_image_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        variance_and_covariance(torch.randn(1, 4))


def test_objective_weighs_the_terms() -> None:
    model = build("vicreg", invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0)
    output = model(**batch("vicreg"))
    parts = [weight * float(output.metrics[name]) for name, weight in
             (("invariance", 2), ("variance", 3), ("covariance", 5))]  # fmt: skip
    assert float(output.loss.detach()) == pytest.approx(sum(parts), rel=1e-6)


def test_expander() -> None:
    projector = build("vicreg").projector
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linears] == [16, 16, 8]
    assert [layer.bias is not None for layer in linears] == [True, True, False]


def test_autocast_does_not_touch_the_terms() -> None:
    first, second = torch.randn(2, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = vicreg_terms(first, second)
    assert all(torch.equal(a, b) for a, b in zip(rough, vicreg_terms(first, second), strict=True))


def test_the_hinge_is_what_prevents_collapse() -> None:
    model, logged = train("vicreg", 0, WIDE)
    spread, rank = health(model)  # seen: 0.76 and 39; untrained 0.30 and 18
    assert spread > 0.5 and rank > 25 and logged[-1]["variance"] < 0.75  # seen: 0.95 to 0.53
    _, logged = train("vicreg", 0, WIDE, variance_weight=0.0, covariance_weight=0.0)
    assert logged[-1]["variance"] > 0.98  # no standard deviation at all is 0.99
