import math

import numpy as np
import pytest
import torch

from hf_ssl.distributed import step_normal, step_uniform
from hf_ssl.methods.joint_embedding import lejepa
from hf_ssl.methods.joint_embedding.lejepa import LeJEPAConfig, sigreg
from tests.contract.tiny import VIT, batch, build
from tests.invariants.test_collapse import RESNET as WIDE
from tests.invariants.test_collapse import health, train


def by_hand(views: np.ndarray, directions: np.ndarray, knots: int, largest: float) -> float:
    """Epps and Pulley with complex exponentials over the whole interval, where the code folds it at 0."""
    t = np.linspace(-largest, largest, 2 * knots - 1)
    gauss = np.exp(-(t**2) / 2)
    total = 0.0
    for rows in views:
        for direction in directions.T:
            projections = rows @ (direction / np.linalg.norm(direction))
            found = np.exp(1j * np.outer(projections, t)).mean(0)
            total += len(rows) * np.trapezoid(np.abs(found - gauss) ** 2 * gauss, t)
    return total / (len(views) * directions.shape[1])


@pytest.mark.parametrize(("knots", "largest"), [(17, 3.0), (9, 5.0)])
def test_sigreg_by_hand(knots: int, largest: float) -> None:
    torch.manual_seed(0)
    views, directions = 2 * torch.randn(3, 7, 5) + 1, torch.randn(5, 4)
    wanted = by_hand(views.double().numpy(), directions.double().numpy(), knots, largest)
    assert float(sigreg(views, directions, knots, largest)) == pytest.approx(wanted, rel=1e-5)


def test_a_gaussian_costs_least() -> None:
    torch.manual_seed(0)
    directions, gauss = torch.randn(8, 32), torch.randn(1, 512, 8)
    least = float(sigreg(gauss, directions))
    others = {
        "collapsed": torch.zeros_like(gauss),
        "one dimension": gauss * torch.eye(8)[0],
        "too wide": 2 * gauss,
        "shifted": gauss + 1,
        "flat": 2 * math.sqrt(3) * (torch.rand_like(gauss) - 0.5),
    }
    for name, views in others.items():
        assert float(sigreg(views, directions)) > 2 * least, name


def test_large_and_small_views_are_regularised_and_pulled_to_the_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(views: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(views.detach())
        return sigreg(views, *args)

    monkeypatch.setattr(lejepa, "sigreg", spy)
    output = build("lejepa")(**batch("lejepa"))
    (views,) = seen
    assert views.shape == (4, 4, 8)  # two large, two small
    agreement = (views - views[:2].mean(0)).square().mean()
    torch.testing.assert_close(output.metrics["agreement"], agreement)
    loss = 0.95 * output.metrics["agreement"] + 0.05 * output.metrics["sigreg"]
    torch.testing.assert_close(output.loss.detach(), loss)


def test_directions_are_new_at_every_step_and_alike_at_one() -> None:
    model = build("lejepa").eval()
    model.projector.train()
    views, found = batch("lejepa"), []
    for step in (0, 0, 1):
        model.step.fill_(step)
        found.append(float(model(**views).metrics["sigreg"]))
    assert found[0] == found[1] != found[2]


def test_shared_random_numbers_are_random() -> None:
    """Moments, no link between neighbours or steps, no step like another, also after very many steps."""
    draws = torch.stack([step_normal(torch.tensor(step), 100, 40) for step in (0, 1, 2, 10**6, 2**31 + 5)])
    flat = draws.flatten(1).double()
    assert flat.mean(1).abs().max() < 0.06 and (flat.std(1) - 1).abs().max() < 0.04
    assert (flat.pow(4).mean(1) - 3).abs().max() < 0.5
    links = torch.corrcoef(torch.cat([flat[:, 1:], flat[:, :-1]])).fill_diagonal_(0)
    assert links.abs().max() < 0.07
    uniform = step_uniform(torch.tensor(3), 4000)
    assert uniform.min() > 0 and uniform.max() <= 1
    assert (uniform.histc(10, 0, 1) - 400).abs().max() < 90
    assert len(set(draws.flatten().tolist())) > 0.99 * draws.numel()
    assert torch.equal(step_normal(torch.tensor(7), 3, 5), step_normal(torch.tensor(7), 3, 5))


def test_autocast_does_not_touch_the_test() -> None:
    views, directions = torch.randn(2, 16, 8), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = sigreg(views, directions)
    assert torch.equal(rough, sigreg(views, directions))


def test_the_weight_is_a_share() -> None:
    for weight in (0, 1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            LeJEPAConfig(backbone_config=dict(VIT), sigreg_weight=weight)


def test_sigreg_is_what_prevents_collapse() -> None:
    model, logged = train("lejepa", 0, WIDE)
    spread, rank = health(model)  # seen: 0.54 and 29; untrained 0.30 and 18
    assert spread > 0.4 and rank > 22 and logged[-1]["sigreg"] < 0.8 * logged[0]["sigreg"]  # seen: 12.8 to 8.5
    _, logged = train("lejepa", 0, WIDE, sigreg_weight=1e-6)
    assert logged[-1]["sigreg"] > 0.98 * logged[0]["sigreg"] and logged[-1]["agreement"] < 1e-4
