"""MoCo and the model it shares with InfoMin: the loss by hand, the queue in use, and BatchNorm's leak."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.losses import info_nce
from hf_ssl.methods.joint_embedding.moco import MoCoConfig, MoCoForPreTraining, MoCoImageProcessor
from tests.contract.tiny import RESNET, VIT, adamw, batch, build, train_step
from tests.invariants.test_collapse import RESNET as LARGER
from tests.invariants.test_collapse import health, train


def test_loss_by_hand() -> None:
    """First views through the student, second views through the teacher, the queue as it stood before the step."""
    model, views = build("moco", RESNET), batch("moco")["pixel_values"]
    with torch.no_grad():
        for parameter in model.teacher_projector.parameters():
            parameter.add_(0.1)  # the two sides differ
        queries = model.projector(model.backbone(views[:, 0]).pooler_output.flatten(1))
        keys = model.teacher_projector(model.teacher_backbone(views[:, 1]).pooler_output.flatten(1))
    queue = model.queue.rows.clone()
    wanted, accuracy = info_nce(F.normalize(queries, dim=1), F.normalize(keys, dim=1), queue, model.config.temperature)
    output = model(views)
    torch.testing.assert_close(output.loss, wanted)
    torch.testing.assert_close(output.metrics["contrastive_accuracy"], accuracy)
    assert output.embeddings.shape == (4, 12)
    assert torch.equal(model.queue.rows, queue)
    model.after_optimizer_step()
    torch.testing.assert_close(model.queue.rows[:4], F.normalize(keys, dim=1))
    assert torch.equal(model.queue.rows[4:], queue[4:]) and model.queue.pointer == 4


def test_micro_batches_of_a_step_meet_the_same_queue_and_evaluation_leaves_it_alone() -> None:
    model = build("moco")
    before = model.queue.rows.clone()
    for seed in range(2):
        model(**batch("moco", seed=seed))
    assert torch.equal(model.queue.rows, before)
    with torch.no_grad():
        assert model.eval()(**batch("moco", seed=2)).loss.isfinite()
    model.after_optimizer_step()
    assert model.queue.pointer == 8 and torch.equal(model.queue.rows[8:], before[8:])


@pytest.mark.parametrize(("fields", "widths"), [({}, [16, 16, 8]), ({"num_layers": 1}, [16, 8])])
def test_the_head_of_version_2_and_of_version_1_has_no_batchnorm(fields: dict, widths: list[int]) -> None:
    projector = build("moco", **fields).projector
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [linears[0].in_features, *(linear.out_features for linear in linears)] == widths
    assert not any(isinstance(module, nn.BatchNorm1d) for module in projector)


def test_views_of_version_1_are_fields() -> None:
    first = MoCoImageProcessor(hue=0.4, jitter_p=1.0, blur_p=0.0).views[0]
    assert (first["hue"], first["jitter_p"], first["blur_p"], first["scale"]) == (0.4, 1.0, 0.0, [0.2, 1.0])


def test_momentum_is_constant() -> None:
    model = build("moco", teacher_momentum=0.9)
    assert model.teacher_momentum(0.0) == model.teacher_momentum(0.7) == model.teacher_momentum(1.0) == 0.9


@pytest.mark.parametrize(("fields", "word"), [
    ({"temperature": 0.0}, "temperature must be positive, got 0"),
    ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MoCoConfig(backbone_config=dict(VIT), **fields)


# --- BatchNorm's leak (moco#46, vissl#576) ------------------------------------------------------------------------


def keys_in_company(model: MoCoForPreTraining) -> tuple[Tensor, Tensor]:
    """Keys of the same two pictures among six others, and among six brighter ones."""
    torch.manual_seed(0)
    own, others = torch.randn(2, 1, 3, 16, 16), torch.randn(6, 1, 3, 16, 16)
    with torch.no_grad():
        return model.keys(torch.cat([own, others]))[:2], model.keys(torch.cat([own, 2 * others + 3]))[:2]


def test_a_key_knows_nothing_of_the_pictures_beside_it() -> None:
    model = build("moco", RESNET)
    train_step(model, adamw(model), batch("moco"))
    assert torch.equal(*keys_in_company(model))
    leaky = build("moco", RESNET, key_batchnorm="batch")
    alone, together = keys_in_company(leaky)
    assert (alone - together).abs().max() > 0.01  # what the loss could read off


def test_the_key_encoders_batchnorm_follows_the_query_encoders() -> None:
    model = build("moco", RESNET, teacher_momentum=0.9)
    norms = [
        next(m for m in part.modules() if isinstance(m, nn.BatchNorm2d))
        for part in (model.backbone, model.teacher_backbone)
    ]
    before = norms[1].running_mean.clone()
    model(**batch("moco"))
    assert torch.equal(norms[1].running_mean, before) and not norms[1].training  # its own passes leave no trace
    model.after_optimizer_step()
    torch.testing.assert_close(norms[1].running_mean, 0.9 * before + 0.1 * norms[0].running_mean)
    assert norms[1].num_batches_tracked == norms[0].num_batches_tracked == 1


def test_embeddings_spread() -> None:
    model, logged = train("moco", 0, LARGER, queue_size=256, temperature=0.2, teacher_momentum=0.9)
    spread, rank = health(model)  # seen: 0.76 and 45; untrained: 0.30 and 18
    assert spread > 0.5 and rank > 25
    assert logged[-1]["contrastive_accuracy"] > logged[0]["contrastive_accuracy"]
