"""Views through backbone and heads, jointly or each alone; the teacher's copies and its momentum."""

import math

import pytest
import torch
from torch import nn

from hf_ssl.multi_view import MultiViewConfig, MultiViewModel
from tests.contract.tiny import RESNET, VIT, batch, build


class Pair(MultiViewModel):
    """A method that asks for nothing: its loss is the embeddings' mean."""

    config: MultiViewConfig
    paper = build("simclr").paper

    def objective(self, embeddings, pixel_values):
        self.given = embeddings, pixel_values
        return embeddings.mean(), {"rows": torch.tensor(float(len(embeddings)))}


def pair(backbone: dict = VIT, **fields) -> Pair:
    torch.manual_seed(0)
    return Pair(MultiViewConfig(backbone_config=dict(backbone), **fields)).train()


@pytest.mark.parametrize(("compared", "views", "word"), [
    (2, 1, "compares exactly 2 views per image, got 1"),
    (2, 3, "compares exactly 2 views per image, got 3"),
    (None, 1, "compares at least 2 views per image, got 1"),
    (2, 2, None),
    (None, 2, None),
    (None, 4, None),
])  # fmt: skip
def test_the_number_of_views_is_checked_before_anything_runs(compared, views: int, word: str | None) -> None:
    model = pair()
    model.compared = compared
    pixels = torch.randn(2, views, 3, 16, 16)
    if word is None:
        assert model(pixels).embeddings.shape == (2 * views, 16)
        return
    with pytest.raises(ValueError, match=f"SimCLR {word}"):
        model(pixels)
    assert not hasattr(model, "given")


def test_training_views_give_loss_embeddings_and_metrics_and_one_view_embeddings_alone() -> None:
    model, pixels = pair(), torch.randn(3, 2, 3, 16, 16)
    output = model(pixels)
    assert torch.equal(output.loss, output.embeddings.mean()) and output.metrics["rows"] == 6
    assert model.given[1] is pixels
    alone = model(pixels[:, 0])
    assert alone.loss is None and alone.metrics is None and torch.equal(alone.embeddings, model.features(pixels[:, 0]))


def test_embeddings_are_view_major() -> None:
    model, pixels = pair(), torch.randn(3, 2, 3, 16, 16)
    embeddings = model(pixels).embeddings
    for view in (0, 1):
        torch.testing.assert_close(embeddings[3 * view : 3 * view + 3], model.features(pixels[:, view]))


def test_views_that_are_the_teachers_alone_never_meet_the_student() -> None:
    model, pixels = pair(), torch.randn(3, 2, 3, 16, 16)
    model.encoded = slice(0, 1)
    with torch.no_grad():
        before = model(pixels).embeddings
        pixels[:, 1] = float("nan")
        assert torch.equal(model(pixels).embeddings, before) and len(before) == 3
    assert model.given[1].shape[1] == 2  # the objective is handed them all


@pytest.mark.parametrize("joint", [True, False])
def test_batchnorm_sees_all_views_or_each(joint: bool) -> None:
    """By hand: backbone and head in one pass over 2·B rows, or in two passes of B."""
    pixels = torch.randn(4, 2, 3, 16, 16) + torch.arange(2.0).view(1, 2, 1, 1, 1)  # the views differ in mean
    model, twin = pair(RESNET, joint_batchnorm=joint), pair(RESNET, joint_batchnorm=joint)
    head = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        got = model.project(head, model.encode(pixels), len(pixels))
        parts = [pixels.transpose(0, 1).flatten(0, 1)] if joint else [pixels[:, 0], pixels[:, 1]]
        wanted = torch.cat([head(rows) for rows in [twin.features(part) for part in parts]])
    torch.testing.assert_close(got, wanted)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], msg=key)


def test_another_backbone_may_encode() -> None:
    model, other, pixels = pair(), pair(RESNET).eval(), torch.randn(2, 2, 3, 16, 16)
    encoded = model.encode(pixels, other.backbone)
    torch.testing.assert_close(encoded[:2], other.features(pixels[:, 0]))


# --- the teacher --------------------------------------------------------------------------------------------------


def test_the_teacher_copies_what_is_followed_and_nothing_else() -> None:
    model = build("byol")
    assert model.followed == ("backbone", "projector")
    assert not hasattr(model, "teacher_predictor")
    for student, teacher in model.teachers():
        assert student is not teacher and not any(p.requires_grad for p in teacher.parameters())
        for one, other in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


def test_what_the_teacher_says_carries_no_gradient_and_is_float32() -> None:
    model, pixels = build("byol"), batch("byol")["pixel_values"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = model.teach(pixels)
    assert not said.requires_grad and said.dtype == torch.float32 and said.shape == (8, 8)
    exact = model.teach(pixels)
    wanted = [
        model.teacher_projector(model.teacher_backbone(view).last_hidden_state[:, 0]) for view in pixels.unbind(1)
    ]
    torch.testing.assert_close(exact, torch.cat(wanted))


@pytest.mark.parametrize(
    ("progress", "wanted"), [(0.0, 0.9), (0.5, 0.95), (1.0, 1.0), (0.25, 1 - 0.05 * (1 + 0.5**0.5))]
)
def test_the_momentum_rises_to_one_along_half_a_cosine(progress: float, wanted: float) -> None:
    assert math.isclose(build("byol", teacher_momentum=0.9).teacher_momentum(progress), wanted)


def test_the_teacher_follows_after_the_step_and_owns_its_batch_statistics() -> None:
    """byol-pytorch#73: an EMA of BatchNorm's statistics on top of the teacher's own would count twice."""
    model, pixels = build("byol", RESNET), batch("byol")["pixel_values"]
    assert all(m.training for m in model.teacher_backbone.modules() if isinstance(m, nn.BatchNorm2d))
    model(pixels)
    statistics = {k: v.clone() for part in ("backbone", "projector")
                  for k, v in getattr(model, f"teacher_{part}").named_buffers(part)}  # fmt: skip
    assert any("running_mean" in key and value.abs().max() > 0 for key, value in statistics.items())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    old = [p.clone() for p in model.teacher_projector.parameters()]
    model.after_optimizer_step(0.0)
    for now, before, student in zip(
        model.teacher_projector.parameters(), old, model.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * student)
    for part in ("backbone", "projector"):
        for key, value in getattr(model, f"teacher_{part}").named_buffers(part):
            assert torch.equal(value, statistics[key]), key
