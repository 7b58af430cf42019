import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ssl.losses import contrastive_logits, nt_xent
from hf_ssl.methods.joint_embedding.simclr import SimCLRConfig
from tests.contract.tiny import RESNET, VIT, batch, build


def by_hand(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """Every anchor of both views: its positive against all 2B − 1 others, itself left out."""
    z = [v / v.norm() for v in (*first, *second)]
    n, losses = len(first), []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [math.exp(float(z[i] @ z[j]) / temperature) for j in range(2 * n) if j != i]
        losses.append(-float(z[i] @ z[positive]) / temperature + math.log(sum(others)))
    return sum(losses) / len(losses)


def test_nt_xent_by_hand() -> None:
    first, second = torch.randn(2, 3, 4)
    loss, accuracy = nt_xent(first, second, 0.5)
    assert float(loss) == pytest.approx(by_hand(first, second, 0.5), rel=1e-5)
    assert float(loss) == pytest.approx(float(nt_xent(5 * first, second / 3, 0.5)[0]), rel=1e-5)  # normalised inside
    assert 0 <= accuracy <= 1


def test_accuracy_counts_positives_that_rank_first() -> None:
    a, b = torch.eye(4)[:2], torch.eye(4)[2:]
    assert nt_xent(torch.stack([*a]), torch.stack([*a]), 0.1)[1] == 1
    assert nt_xent(torch.stack([a[0], a[1]]), torch.stack([a[1], a[0]]), 0.1)[1] == 0
    assert nt_xent(torch.stack([a[0], a[1]]), torch.stack([a[0], b[0]]), 0.1)[1] >= 0.5


def test_an_anchor_never_meets_itself() -> None:
    logits, positive = contrastive_logits(torch.randn(3, 4), torch.randn(3, 4), 1.0)
    assert positive.tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(logits.isinf(), torch.eye(6, dtype=torch.bool))


def test_chance_is_the_logarithm_of_the_candidates() -> None:
    loss, _ = nt_xent(torch.randn(64, 32), torch.randn(64, 32), 100.0)
    assert float(loss) == pytest.approx(math.log(127), abs=0.01)


def test_autocast_does_not_touch_the_loss() -> None:
    first, second = torch.randn(2, 16, 8)
    exact = nt_xent(first, second, 0.1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(first, second, 0.1)[0], exact)
    rough = nt_xent(first.bfloat16(), second.bfloat16(), 0.1)[0]
    assert rough.dtype == torch.float32 and rough.isfinite()


@pytest.mark.parametrize(("config", "widths"), [
    ({"hidden_dim": None}, [16, 16, 8]),
    ({"hidden_dim": 24}, [16, 24, 8]),
    ({"hidden_dim": 24, "num_layers": 3}, [16, 24, 24, 8]),
])  # fmt: skip
def test_projector(config: dict, widths: list[int]) -> None:
    projector = build("simclr", **config).projector
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [linears[0].in_features, *(linear.out_features for linear in linears)] == widths
    assert all(linear.bias is None for linear in linears)  # BatchNorm's shift serves
    assert isinstance(projector[-1], nn.BatchNorm1d) and projector[-1].bias is None


def test_both_views_share_one_pass_so_batchnorm_sees_both() -> None:
    model = build("simclr")
    first, second = torch.randn(2, 4, 3, 16, 16)
    seen = []
    model.projector.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    output = model(torch.stack([first, second + 1], dim=1))
    assert len(seen) == 1 and torch.equal(seen[0], output.embeddings)
    assert torch.allclose(output.embeddings[4:], model.features(second + 1), atol=1e-5)  # view-major


def test_features_come_before_the_projector() -> None:
    model = build("simclr").eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images).embeddings, model.backbone(images).last_hidden_state[:, 0])


@pytest.mark.parametrize(("shape", "word"), [
    ((4, 1, 3, 16, 16), "exactly 2 views per image, got 1"),
    ((4, 3, 3, 16, 16), "exactly 2 views per image, got 3"),
    ((1, 2, 3, 16, 16), "no negatives"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(shape: tuple, word: str) -> None:
    model = build("simclr")
    model.projector.eval()  # a BatchNorm refuses one image as well, in other words
    with pytest.raises(ValueError, match=word):
        model(torch.randn(shape))


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        SimCLRConfig(backbone_config=dict(VIT), temperature=0.0)


def test_gradient_by_hand() -> None:
    first = torch.randn(3, 4, dtype=torch.float32).requires_grad_()
    second = torch.randn(3, 4)
    nt_xent(first, second, 0.5)[0].backward()
    step = 1e-2
    probe = F.one_hot(torch.tensor(1), 4).float() * step
    up, down = first.detach().clone(), first.detach().clone()
    up[0] += probe
    down[0] -= probe
    slope = (by_hand(up, second, 0.5) - by_hand(down, second, 0.5)) / (2 * step)
    assert float(first.grad[0, 1]) == pytest.approx(slope, abs=1e-3)


def test_batchnorm_over_both_views_or_over_each() -> None:
    """Apart, loss and statistics are those of two passes; a network without BatchNorm does not care."""
    views = batch("simclr")["pixel_values"]
    joint, apart, twice = (build("simclr", RESNET, joint_batchnorm=kind) for kind in (True, False, True))
    first, second = (twice.projector(twice.features(view)) for view in views.unbind(1))
    output = apart(views)
    torch.testing.assert_close(output.loss, nt_xent(first, second, twice.config.temperature)[0])
    assert abs(float(output.loss - joint(views).loss)) > 1e-4
    torch.testing.assert_close(dict(apart.named_buffers()), dict(twice.named_buffers()))
    vits = [build("simclr", joint_batchnorm=kind, num_layers=1) for kind in (True, False)]
    torch.testing.assert_close(*(model.backbone(views[:, 0]).last_hidden_state for model in vits))
