"""The linear probe: closed forms, the choice of its setting, and what it must not look at."""

import math

import pytest
import torch

from hf_ssl.evaluation import linear_probe
from hf_ssl.evaluation.linear import LBFGSProbe, _holdout, _SGDProbe


def _blobs(n: int, noise: float, seed: int, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 5 * torch.eye(classes, 6)
    return centres[y] + noise * torch.randn(n, 6, generator=generator), y


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_separable_data_is_separated(solver):
    (x, y), (x_test, y_test) = _blobs(120, 0.3, 0), _blobs(60, 0.3, 1)
    result = linear_probe(x * 40 + 7, y, x_test * 40 + 7, y_test, solver=solver, iterations=100)
    assert result["top1"] == 1.0 and result["holdout_top1"] == 1.0 and result["solver"] == solver


def test_lbfgs_reaches_the_known_optimum():
    # x = +-1, y = class: by symmetry W = [[-w, w]], bias 0, and the gradient of log(1 + exp(-2w)) + strength w^2 is 0
    x, y = torch.tensor([[-1.0], [1.0]] * 4), torch.tensor([0, 1] * 4)
    strength = 0.1
    (solution,) = LBFGSProbe(2, 100).fit(x, y, [strength])
    w = solution[0, 1].item()
    assert solution[0, 0].item() == pytest.approx(-w, abs=1e-3) and solution[1].abs().max() < 1e-3
    assert 2 / (1 + math.exp(2 * w)) == pytest.approx(2 * strength * w, abs=1e-3)


def test_sgd_step_by_hand_and_heads_do_not_mix():
    x, y = torch.tensor([[2.0]]), torch.tensor([1])
    slow, fast = _SGDProbe(2, 1, 1, seed=3).fit(x, y, [0.0, 256.0])
    start = 0.01 * torch.randn(2, 2, generator=torch.Generator().manual_seed(3))
    start[-1] = 0
    assert torch.equal(slow, start)  # rate 0 moves nothing, whatever the head beside it does
    p = torch.softmax(torch.tensor([[2.0, 1.0]]) @ start, dim=1)[0]
    gradient = torch.tensor([[2.0], [1.0]]) * (p - torch.tensor([0.0, 1.0]))
    assert torch.allclose(fast, start - 256.0 * 1 / 256 * gradient, atol=1e-6)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_labels_of_test_never_influence_the_choice(solver):
    (x, y), (x_test, y_test) = _blobs(90, 4.0, 0), _blobs(60, 4.0, 1)
    results = [
        linear_probe(x, y, x_test, labels, solver=solver, iterations=30)
        for labels in (y_test, y_test.flip(0), (y_test + 1) % 3, torch.zeros_like(y_test))
    ]
    assert len({(r["chosen"], r["holdout_top1"]) for r in results}) == 1
    assert results[0]["top1"] + results[2]["top1"] <= 1.0  # same predictions, other truth


def test_features_of_test_never_influence_the_choice_or_the_scale():
    (x, y), (x_test, y_test) = _blobs(90, 4.0, 0), _blobs(60, 4.0, 1)
    alone = linear_probe(x, y, x_test[:1], y_test[:1], iterations=30)
    together = linear_probe(x, y, torch.cat([x_test[:1], x_test[1:] * 1e4]), y_test, iterations=30)
    assert (alone["chosen"], alone["holdout_top1"]) == (together["chosen"], together["holdout_top1"])


def test_the_strength_with_the_best_holdout_is_taken():
    (x, y), (x_test, y_test) = _blobs(300, 5.0, 0), _blobs(60, 5.0, 1)
    strengths = (30.0, 1.0, 0.01)
    alone = {s: linear_probe(x, y, x_test, y_test, strengths=(s,)) for s in strengths}
    together = linear_probe(x, y, x_test, y_test, strengths=strengths)
    best = max(strengths, key=lambda s: alone[s]["holdout_top1"])
    assert len({r["holdout_top1"] for r in alone.values()}) > 1
    assert together["holdout_top1"] == pytest.approx(
        alone[best]["holdout_top1"], abs=0.02
    )  # warm starts differ a hair
    assert together["top1"] == pytest.approx(alone[together["chosen"]]["top1"], abs=0.02)


def test_holdout_is_stratified_keeps_groups_together_and_every_class_in_the_fit():
    y = torch.tensor([0] * 10 + [1] * 10 + [2])
    held = _holdout(y, 0.2, None, seed=0)
    assert [int(held[y == c].sum()) for c in range(3)] == [2, 2, 0]
    groups = [i // 2 for i in range(20)] + [10]
    held = _holdout(y, 0.2, groups, seed=0)
    assert [int(held[y == c].sum()) for c in range(3)] == [2, 2, 0]
    assert all(held[i] == held[i + 1] for i in range(0, 20, 2))


def test_labels_unknown_to_train_and_single_examples(caplog):
    x = torch.eye(4)
    result = linear_probe(x, ["a", "b", "c", "d"], x[:2], ["a", "zebra"], iterations=20)
    assert result["top1"] == 0.5
    assert "no class has two examples" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "adam"}, "lbfgs"),
        ({"train_labels": [0, 0, 0]}, "2 classes"),
        ({"train_labels": [0, 1]}, "labels"),
        ({"holdout": 1.0}, "holdout"),
        ({"groups": [1]}, "groups"),
    ],
)
def test_wrong_arguments_are_sentences(change, message):
    arguments = {
        "train_features": torch.eye(3),
        "train_labels": [0, 1, 0],
        "test_features": torch.eye(3),
        "test_labels": [0, 1, 0],
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, **change})
