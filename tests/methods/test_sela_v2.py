import pytest
import torch
import torch.nn.functional as F

from hf_ssl.methods.joint_embedding.deepcluster_v2 import IGNORED
from tests.contract.tiny import adamw, batch, build, train_step


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def epoch(model, rows: torch.Tensor) -> None:
    for index in torch.arange(rows.shape[1]).split(4):
        model.memory.push(index, rows[:, index])
        model.update_state()


def test_labels_by_hand() -> None:
    """The plan over all images whose marginals are equal (eq. 3), made of logs; the label is its largest entry."""
    model = build("sela_v2", num_examples=24, epsilon=0.1, sinkhorn_iterations=200)
    rows = unit(2, 24, 8)
    epoch(model, rows)
    for head, prototypes in enumerate(model.prototypes):
        plan = (rows[head % 2] @ prototypes.weight.T).double() / 0.1
        for _ in range(200):
            plan = plan - plan.logsumexp(0)
            plan = plan - plan.logsumexp(1, keepdim=True)
        assert torch.equal(plan.argmax(1), model.memory.labels[head])


def test_clusters_are_of_one_size_though_all_images_prefer_one() -> None:
    model = build("sela_v2", num_examples=120, epsilon=0.02, sinkhorn_iterations=200)
    rows = F.normalize(model.prototypes[0].weight[0].detach() + 0.5 * unit(2, 120, 8), dim=2)
    assert (rows[0] @ model.prototypes[0].weight.T).argmax(1).bincount(minlength=6).max() > 60
    epoch(model, rows)
    assert model.memory.labels[0].bincount(minlength=6).max() <= 30  # 20 each, but for ties


def test_images_that_the_epoch_did_not_show_have_no_share() -> None:
    model = build("sela_v2", num_examples=14)
    rows = unit(2, 12, 8)
    epoch(model, rows)
    assert (model.memory.labels[:, 12:] == IGNORED).all()
    whole = build("sela_v2", num_examples=12)
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory.")}, strict=False)
    epoch(whole, rows)
    assert torch.equal(whole.memory.labels, model.memory.labels[:, :12])


def test_the_gradient_trains_the_prototypes_once_they_thaw() -> None:
    model = build("sela_v2", freeze_prototypes=0.1)
    model.total_steps.fill_(10)
    optimizer = adamw(model)
    for step in range(2):
        before = model.prototypes[0].weight.detach().clone()
        train_step(model, optimizer, batch("sela_v2", seed=step))
        assert torch.allclose(before, model.prototypes[0].weight, atol=1e-6) == (step == 0)
        assert model.prototypes[0].weight.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
