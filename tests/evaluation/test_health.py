"""Collapse figures against values known in closed form, and the sentences they lead to."""

import math

import pytest
import torch

from hf_ssl.evaluation import (
    alignment,
    diagnose,
    distribution_entropy,
    feature_std,
    health_report,
    rankme,
    uniformity,
)


def test_std_is_taken_over_samples_not_over_channels():
    # every sample has the same feature, whose channels differ a lot: collapsed, whatever the other axis says
    collapsed = torch.tensor([[3.0, -1.0, 0.5, 2.0]]).repeat(50, 1)
    assert feature_std(collapsed) == pytest.approx(0, abs=1e-7)
    # each sample is constant over its channels; half are (+,+,+,+)/2 and half (-,-,-,-)/2: spread exactly 1/sqrt(4)
    alive = torch.ones(50, 4)
    alive[::2] *= -1
    assert feature_std(alive) == pytest.approx(0.5)


def test_std_of_even_directions_is_one_over_sqrt_d_and_ignores_length():
    features = torch.cat([torch.eye(8), -torch.eye(8)])  # every channel: two of 16 samples are +-1 -> variance 1/8
    assert feature_std(features) == pytest.approx(1 / math.sqrt(8))
    assert feature_std(features * torch.arange(1, 17)[:, None]) == pytest.approx(1 / math.sqrt(8))
    assert health_report(features)["std_ratio"] == pytest.approx(1.0)


def test_rankme_of_known_singular_values():
    for sigma in ([1.0, 1.0, 1.0, 1.0], [4.0, 2.0, 1.0], [9.0, 0.0]):
        p = [s / sum(sigma) + 1e-7 for s in sigma]
        expected = math.exp(-sum(q * math.log(q) for q in p))
        assert rankme(torch.diag(torch.tensor(sigma))) == pytest.approx(expected, rel=1e-6)
    assert rankme(torch.diag(torch.ones(4))) == pytest.approx(4.0, rel=1e-5)
    assert rankme(torch.zeros(5, 3)) == 1.0


def test_rankme_is_uncentred_and_sampled_reproducibly():
    constant = torch.ones(20, 5)  # centring would leave nothing; un-centred it has rank one
    assert rankme(constant) == pytest.approx(1.0, abs=1e-4)
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    assert rankme(features, max_samples=10) == rankme(features, max_samples=10) != rankme(features)


def test_uniformity_and_alignment_by_hand():
    antipodal = torch.tensor([[2.0, 0.0], [-5.0, 0.0]])  # unit vectors at distance 2: log exp(-2 * 4)
    assert uniformity(antipodal) == pytest.approx(-8.0)
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0.0, abs=1e-6)
    # three points at 0, 90 and 180 degrees: squared distances 2, 2, 4
    three = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert uniformity(three) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert alignment(three, three * 4) == pytest.approx(0.0, abs=1e-7)
    assert alignment(three[:1], three[1:2]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="same images"):
        alignment(three, three[:2])


def test_entropies_tell_both_ways_to_collapse():
    uniform = torch.full((8, 4), 0.25)
    assert distribution_entropy(uniform) == pytest.approx({"entropy": 1.0, "marginal_entropy": 1.0})
    one_output = torch.eye(4)[[2] * 8]
    assert distribution_entropy(one_output) == pytest.approx({"entropy": 0.0, "marginal_entropy": 0.0}, abs=1e-6)
    healthy = torch.eye(4)[[0, 1, 2, 3] * 2]
    assert distribution_entropy(healthy) == pytest.approx({"entropy": 0.0, "marginal_entropy": 1.0}, abs=1e-6)
    with pytest.raises(ValueError, match="softmax"):
        distribution_entropy(torch.randn(4, 4))


def test_a_healthy_report_says_nothing():
    generator = torch.Generator().manual_seed(0)
    report = health_report(torch.randn(400, 32, generator=generator))
    assert diagnose({**report, "entropy": 0.4, "marginal_entropy": 0.9, "loss": 2.0}) == []


def test_each_collapse_has_its_words():
    collapsed = health_report(torch.ones(50, 16) + 1e-5 * torch.randn(50, 16))
    words = " ".join(diagnose(collapsed))
    assert "nearly the same feature" in words and "learning rate" in words and "one direction" in words
    assert any("uniform" in w for w in diagnose({"entropy": 0.995}))
    assert any("same teacher output" in w for w in diagnose({"marginal_entropy": 0.01}))
    assert any("NaN" in w for w in diagnose({"loss": float("nan")}))
    low_rank = torch.randn(400, 2) @ torch.randn(2, 128)
    assert any("Few directions" in w for w in diagnose(health_report(low_rank)))


def test_a_network_that_started_bunched_together_is_not_called_collapsed_for_it():
    start = {"std_ratio": 0.015, "rankme": 1.2, "dim": 192.0}
    assert diagnose({"std_ratio": 0.03, "rankme": 2.0, "dim": 192.0}, start) == []
    assert diagnose({"std_ratio": 0.005, "rankme": 1.02, "dim": 192.0}, start)
