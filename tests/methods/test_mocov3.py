"""MoCo v3: the loss by hand, what stays frozen in a ViT, and the heads of the two kinds of backbone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.backbones import sincos_2d
from hf_ssl.methods.joint_embedding.mocov3 import MoCoV3Config, contrast
from tests.contract.tiny import RESNET, VIT, adamw, batch, build, train_step
from tests.invariants.test_collapse import RESNET as LARGER
from tests.invariants.test_collapse import health, train


def by_hand(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Algorithm 1: 2τ · mean of −log softmax at the query's own key."""
    losses = []
    for row, query in enumerate(queries):
        scores = torch.stack([F.cosine_similarity(query, key, dim=0) / temperature for key in keys])
        losses.append(scores.logsumexp(0) - scores[row])
    return 2 * temperature * torch.stack(losses).mean()


def test_contrast_by_hand() -> None:
    queries, keys = torch.randn(3, 4), torch.randn(3, 4)
    loss, accuracy = contrast(queries, keys, 0.2)
    torch.testing.assert_close(loss, by_hand(queries, keys, 0.2))
    assert contrast(keys, keys, 0.2)[1] == 1 and 0 <= accuracy <= 1
    other = torch.randn(3, 4)  # another rank's keys stand first
    moved = contrast(queries, torch.cat([other, keys]), 0.2, own_key=3)[0]
    torch.testing.assert_close(moved, by_hand(queries, torch.cat([keys, other]), 0.2))


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_loss_is_each_view_against_the_teachers_other_view(backbone: dict) -> None:
    model, twin = build("mocov3", backbone), build("mocov3", backbone)
    views = batch("mocov3", 6)["pixel_values"]
    with torch.no_grad():
        for one in (model, twin):
            for parameter in one.teacher_backbone.parameters():
                parameter.mul_(1.1)  # the two sides differ
    queries, keys = [], []
    for view in views.unbind(1):
        queries.append(twin.predictor(twin.projector(twin.features(view))))
        teacher = twin.teacher_backbone(view)
        rows = teacher.last_hidden_state[:, 0] if backbone is VIT else teacher.pooler_output.flatten(1)
        keys.append(twin.teacher_projector(rows).detach())
    tau = model.config.temperature
    output = model(views)
    torch.testing.assert_close(output.loss, by_hand(queries[0], keys[1], tau) + by_hand(queries[1], keys[0], tau))
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):  # a BatchNorm pass for each view
        torch.testing.assert_close(ours, theirs)
    assert output.embeddings.shape[0] == 12


def test_patch_projection_and_positions_never_move() -> None:
    model = build("mocov3")
    embeddings = model.backbone.embeddings
    frozen = [*embeddings.patch_embeddings.projection.parameters(), embeddings.position_embeddings]
    assert {id(p) for p in model.frozen_parameters()} == {id(p) for p in frozen}
    before = [parameter.clone() for parameter in frozen]
    optimizer = adamw(model)
    for seed in range(2):
        train_step(model, optimizer, batch("mocov3", seed=seed))
    assert all(torch.equal(now, old) for now, old in zip(frozen, before))
    free = build("mocov3", freeze_patches=False, fixed_positions=False)
    assert not list(free.frozen_parameters())
    free(**batch("mocov3")).loss.backward()
    assert free.backbone.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    assert not list(build("mocov3", RESNET).frozen_parameters())


def test_positions_are_the_papers_row_first_and_a_checkpoints_stay(tmp_path) -> None:
    wide = {**VIT, "image_size": [8, 16]}
    table = build("mocov3", wide).backbone.embeddings.position_embeddings
    assert torch.equal(table, sincos_2d(16, (2, 4), prefix=1, row_first=True)[None])
    assert not table[0, 0].any() and len(table[0].unique(dim=0)) == 9
    assert torch.equal(table[0, 1, :8], table[0, 2, :8])  # one row, two columns: the first half is the row's
    model = build("mocov3")
    with torch.no_grad():
        model.backbone.embeddings.position_embeddings.add_(1.0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.backbone.embeddings.position_embeddings, model.backbone.embeddings.position_embeddings)


@pytest.mark.parametrize(("backbone", "projector", "predictor_norm"), [
    (VIT, [16, 16, 16, 8], True), (RESNET, [12, 16, 8], False),
], ids=["vit", "resnet"])  # fmt: skip
def test_heads_of_the_paper(backbone: dict, projector: list[int], predictor_norm: bool) -> None:
    model = build("mocov3", backbone)
    linears = [module for module in model.projector if isinstance(module, nn.Linear)]
    assert [linears[0].in_features, *(linear.out_features for linear in linears)] == projector
    assert all(linear.bias is None for linear in (*linears, model.predictor[0], model.predictor[-2]) if
               isinstance(linear, nn.Linear))  # fmt: skip
    last = model.projector[-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.affine
    assert isinstance(model.predictor[-1], nn.BatchNorm1d) == predictor_norm
    layers = [module for module in (*model.projector, *model.predictor) if isinstance(module, nn.BatchNorm1d)]
    assert len({id(layer) for layer in layers}) == len(layers)  # none is shared


def test_momentum_rises_to_one() -> None:
    model = build("mocov3", teacher_momentum=0.9)
    assert [round(model.teacher_momentum(p), 6) for p in (0.0, 0.5, 1.0)] == [0.9, 0.95, 1.0]


def test_the_teachers_batchnorm_owns_its_statistics() -> None:
    """EMA skips BatchNorm's buffers (byol-pytorch#73, moco#70): the teacher runs in training mode, as published."""
    model = build("mocov3", RESNET)
    norm = next(m for m in model.teacher_backbone.modules() if isinstance(m, nn.BatchNorm2d))
    model(**batch("mocov3"))
    assert norm.training and norm.num_batches_tracked == 2
    seen = norm.running_mean.clone()
    model.after_optimizer_step()
    assert torch.equal(norm.running_mean, seen)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        MoCoV3Config(backbone_config=dict(VIT), temperature=0.0)


def test_embeddings_spread() -> None:
    fields = {"hidden_dim": 64, "projection_dim": 32, "teacher_momentum": 0.9, "temperature": 0.5}
    model, logged = train("mocov3", 0, LARGER, **fields)
    spread, rank = health(model)  # seen: 0.76 and 45; untrained: 0.30 and 18
    assert spread > 0.5 and rank > 25
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3  # seen: 7.09 to 6.51
