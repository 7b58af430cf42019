"""SimCLR v2: the head's first layer as a backbone to fine-tune, and the memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ssl.evaluation import evaluate_backbone, extract_features, low_shot
from hf_ssl.losses import nt_xent
from hf_ssl.methods.joint_embedding.simclr_v2 import SimCLRv2Config
from tests.contract.tiny import RESNET, VIT, adamw, batch, build, processor, train_step
from tests.evaluation.toys import pictures


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_fine_tuning_starts_from_the_heads_first_layer(backbone: dict) -> None:
    """linear → BatchNorm → ReLU of the first layer, by hand, with the running statistics."""
    model = build("simclr_v2", backbone)
    train_step(model, adamw(model), batch("simclr_v2"))
    kept = model.fine_tuning_backbone().eval()
    images = torch.randn(5, 3, 16, 16)
    linear, norm = model.projector[0], model.projector[1]
    with torch.no_grad():
        hidden = model.features(images) @ linear.weight.T
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        wanted = ((hidden - norm.running_mean) * scale + norm.bias).clamp(min=0)
        got = kept(images)
    torch.testing.assert_close(got.pooler_output, wanted)
    assert got.pooler_output.shape == (5, 16) and torch.equal(got.last_hidden_state[:, 0], got.pooler_output)
    mine = {name for name, _ in kept.named_parameters() if not name.startswith("backbone.")}
    assert mine == {"layer.0.weight", "layer.1.weight", "layer.1.bias"}


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_evaluation_takes_it_for_a_model(backbone: dict) -> None:
    model = build("simclr_v2", backbone)
    kept, made = model.fine_tuning_backbone(), processor("simclr_v2")
    labels = [0, 1, 2] * 8
    bank, queries = pictures(labels), pictures(labels[:9])
    features = [extract_features(kept, source, made, progress=False) for source in (bank, queries)]
    pixels = made.eval_processor()([bank.image(row, i) for i, row in enumerate(bank.dataset)], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(features[0].embeddings, kept.eval()(pixels["pixel_values"]).pooler_output)
    scores = low_shot(features[0].embeddings, labels, features[1].embeddings, labels[:9], fractions=(0.5,))
    assert 0 <= scores["lowshot50"] <= 1
    table = evaluate_backbone(
        kept, made, bank, queries, measures=("low_shot",), baselines=False, pairing=None, progress=False
    )
    assert "lowshot10" in str(table)


def test_a_classifier_on_it_learns_through_the_kept_layer() -> None:
    """A linear layer on top, gradients into backbone and kept layer; the rest of the head takes no part."""
    model = build("simclr_v2", RESNET)
    kept, top = model.fine_tuning_backbone().train(), nn.Linear(16, 2)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 2
    optimizer = torch.optim.Adam([*kept.parameters(), *top.parameters()], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(top(kept(images).pooler_output), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert kept.layer[0].weight.grad.abs().max() > 0 and model.projector[3].weight.grad is None


def test_the_memory_adds_negatives_and_is_filled_by_the_teacher() -> None:
    model, plain = build("simclr_v2", memory_size=20), build("simclr_v2", memory_size=0)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("queue", "teacher"))})
    views = batch("simclr_v2")["pixel_values"]
    with torch.no_grad():
        for parameter in model.teacher_projector.parameters():
            parameter.add_(0.1)
        first, second = plain.projector(plain.encode(views)).chunk(2)
    wanted = nt_xent(first, second, 1.0, memory=model.queue.rows)[0]
    keys = F.normalize(model.teach(views), dim=1)
    loss = model(views).loss
    torch.testing.assert_close(loss, wanted)
    assert loss > plain(views).loss
    model.after_optimizer_step()
    torch.testing.assert_close(model.queue.rows[:8], keys)
    assert not list(plain.teachers()) and not hasattr(plain, "queue")
    followed = [student for student, _ in model.teachers()]
    assert followed[0] is model.backbone and followed[1] is model.projector


def test_a_memory_key_knows_nothing_of_the_pictures_beside_it() -> None:
    model = build("simclr_v2", RESNET)
    own, others = torch.randn(2, 1, 3, 16, 16), torch.randn(6, 1, 3, 16, 16)
    assert torch.equal(*(model.teach(torch.cat([own, rest]))[:2] for rest in (others, 2 * others + 3)))


@pytest.mark.parametrize(("fields", "word"), [
    ({"temperature": 0.0}, "temperature must be positive, got 0"),
    ({"num_layers": 1}, "num_layers must be at least 2, got 1"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SimCLRv2Config(backbone_config=dict(VIT), **fields)
