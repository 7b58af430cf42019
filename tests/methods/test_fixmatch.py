"""What FixMatch adds to its base class: which guesses count, what the targets are, and that it learns from them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ssl.methods.semi_supervised.fixmatch import FixMatchConfig, FixMatchForPreTraining
from hf_ssl.semi_supervised import DistributionAlignment
from hf_ssl.training import SSLTrainingArguments
from tests.contract.tiny import VIT, batch, build, pictures, processor


def logits_of(*rows: list[float]) -> Tensor:
    """Logits whose softmax is the given probabilities."""
    return torch.tensor(rows).log()


def test_a_guess_counts_from_the_threshold_on_and_is_a_class() -> None:
    model: Any = build("fixmatch", threshold=0.95)
    targets, weights = model.targets(logits_of([0.96, 0.02, 0.01, 0.01], [0.03, 0.01, 0.94, 0.02]))
    assert weights.tolist() == [1.0, 0.0]
    assert targets.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    edge = logits_of([0.8, 0.1, 0.05, 0.05])
    model.config.threshold = float(edge.softmax(-1).max())
    assert model.targets(edge)[1] == 1.0  # "at least", as in the published code


def test_the_temperature_acts_on_the_targets_and_never_on_the_threshold() -> None:
    """Trap: a sharpened 0.6 passes any threshold; a sharpening helper that returns its input changes nothing."""
    logits = logits_of([0.6, 0.2, 0.1, 0.1])
    model: Any = build("fixmatch", threshold=0.95, temperature=0.1)
    targets, weights = model.targets(logits)
    assert float(targets.max()) > 0.95 and weights == 0.0
    model.config.temperature = 0.5
    sharpened = torch.tensor([0.36, 0.04, 0.01, 0.01])
    torch.testing.assert_close(model.targets(logits)[0][0], sharpened / sharpened.sum())


@pytest.mark.parametrize(("fields", "word"), [
    ({"threshold": 1.5}, "threshold must lie in"),
    ({"temperature": -1}, "temperature must not be negative"),
    ({"unlabeled_weight": -0.5}, "unlabeled_weight must not be negative"),
    ({"ema_momentum": 1.01}, "ema_momentum must lie in"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_in_words(fields: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        FixMatchConfig(backbone_config=dict(VIT), **fields)


def test_views_serve_their_rows() -> None:
    made = processor("fixmatch")
    views = made(pictures(3), seed=0)
    assert {key: tuple(value.shape) for key, value in views.items()} == {
        key: (3, 1, 3, 16, 16) for key in ("pixel_values", "weak_pixel_values", "strong_pixel_values")
    }
    still = processor("fixmatch", hflip=0.0, translate=0.0)(pictures(3), seed=0)
    assert torch.equal(still["pixel_values"], still["weak_pixel_values"])  # nothing else varies in a weak view
    changed = (still["strong_pixel_values"] != still["pixel_values"]).float().mean()
    assert changed > 0.2  # Cutout alone
    groups = {group["key"]: group for group in made.views}
    assert groups["weak_pixel_values"] == {**groups["pixel_values"], "key": "weak_pixel_values"}
    strong = groups["strong_pixel_values"]
    assert (strong["randaugment"], strong["randaugment_magnitude"], strong["randaugment_p"]) == (2, 10, 0.5)
    assert strong["cutout"] == 0.5 and strong["translate"] == 0.125 and strong["hflip"] == 0.5


def test_the_papers_optimiser(tmp_path) -> None:
    fields = dict(FixMatchForPreTraining.default_arguments)
    args = SSLTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **fields)
    assert args.own_optimiser == "sgd_nesterov" and args.momentum == 0.9 and args.weight_decay == 5e-4
    assert args.own_schedule is not None
    assert args.own_schedule(0.5, 0.03) == pytest.approx(0.03 * math.cos(7 * math.pi / 32))
    assert args.own_schedule(1.0, 0.03) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))
    assert args.max_grad_norm == 0 and args.per_device_train_batch_size == 64


def test_bf16_keeps_the_loss_in_float32() -> None:
    model, views = build("fixmatch"), batch("fixmatch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**views)
    assert output.loss.dtype == output.metrics["unlabeled_loss"].dtype == torch.float32


# --- it learns from unlabelled images -----------------------------------------------------------------------------

CLASSES, SIDE, STEPS = 4, 12, 120
NET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
    "num_channels": 1, "downsample_in_first_stage": False, "num_labels": CLASSES,
}  # fmt: skip


def stripes(seed: int) -> tuple[Tensor, Tensor]:
    """400 noisy wave patterns of random phase, (400, 1, 12, 12), and their classes: the direction of the waves."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(400) % CLASSES
    angle = (labels * math.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    phase = 6.28 * torch.rand(400, 1, 1, generator=generator)
    waves = torch.sin(1.6 * (angle.cos() * x + angle.sin() * y) + phase)
    return (waves + 0.6 * torch.randn(400, SIDE, SIDE, generator=generator)).unsqueeze(1), labels


def weak(images: Tensor) -> Tensor:
    return (images + 0.1 * torch.randn_like(images)).unsqueeze(1)


def strong(images: Tensor) -> Tensor:
    """Shifted, of another brightness and contrast, with a hole and noise."""
    shift = torch.randint(SIDE, (2,)).tolist()
    images = images.roll(shift, (2, 3)) * torch.empty(len(images), 1, 1, 1).uniform_(0.5, 1.5)
    images = images + 0.5 * torch.randn(len(images), 1, 1, 1)
    for image, (row, column) in zip(images, torch.randint(0, SIDE - 3, (len(images), 2)).tolist(), strict=True):
        image[:, row : row + 4, column : column + 4] = 0.0
    return (images + 0.3 * torch.randn_like(images)).unsqueeze(1)


def accuracy(seed: int, unlabeled: bool) -> float:
    """Test accuracy of the EMA after STEPS steps on two labelled images a class, with or without 200 unlabelled."""
    torch.manual_seed(seed)
    images, labels = stripes(seed)
    few = torch.cat([torch.where(labels[:200] == c)[0][:2] for c in range(CLASSES)])
    model = FixMatchForPreTraining(FixMatchConfig(backbone_config=dict(NET), ema_momentum=0.9)).train()
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(STEPS):
        drawn = images[torch.randint(200, (32,))]
        views = {"pixel_values": weak(images[few]), "labels": labels[few]}
        if unlabeled:
            views |= {"weak_pixel_values": weak(drawn), "strong_pixel_values": strong(drawn)}
        optimizer.zero_grad()
        model(**views).loss.backward()
        optimizer.step()
        model.after_optimizer_step()
    with torch.no_grad():
        return float((model.eval()(images[200:]).logits.argmax(-1) == labels[200:]).float().mean())


def test_unlabelled_images_lift_the_accuracy() -> None:
    """Seen over seeds 0–11: 1.00 with unlabelled images on every seed; 0.66–0.97 without."""
    alone, together = ([accuracy(seed, unlabeled) for seed in range(3)] for unlabeled in (False, True))
    assert min(together) > 0.9 and sum(together) - sum(alone) > 3 * 0.1, (alone, together)


def test_alignment_by_hand() -> None:
    """Two classes, labels 3 : 1; the first batch's mean guess is (.8, .2), the second one's (.4, .6)."""
    aligner = DistributionAlignment(2, 0.5).train()
    aligner.observe(torch.tensor([0, 0, 0, 1]))
    first = aligner(torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
    # no step yet: the labels count as even, and the batch itself is the mean guess
    torch.testing.assert_close(
        first[0], torch.tensor([0.9 / 0.8, 0.1 / 0.2]) / (0.9 / 0.8 + 0.1 / 0.2), atol=1e-5, rtol=0
    )
    aligner.update()
    torch.testing.assert_close(aligner.labeled, torch.tensor([0.625, 0.375]))  # halfway from (.5, .5) to (.75, .25)
    torch.testing.assert_close(aligner.guessed, torch.tensor([0.8, 0.2]))
    second = aligner(torch.tensor([[0.4, 0.6]]))
    mean = torch.tensor([0.6, 0.4])  # halfway from (.8, .2) to (.4, .6)
    wanted = torch.tensor([0.4, 0.6]) * torch.tensor([0.625, 0.375]) / mean
    torch.testing.assert_close(second[0], wanted / wanted.sum(), atol=1e-5, rtol=0)
    before = aligner.guessed.clone()
    aligner.eval()(torch.tensor([[0.5, 0.5]]))
    aligner.train().update()
    torch.testing.assert_close(aligner.guessed, (before + torch.tensor([0.4, 0.6])) / 2)  # evaluation was not counted


def test_alignment_lets_a_rare_class_through_and_keeps_a_skewed_prior() -> None:
    """A class the model favours loses, one it neglects wins; labels that are skewed themselves are left skewed."""
    model = build("fixmatch", threshold=0.4, alignment_momentum=0.9)
    logits = torch.tensor([[2.0, 1.8, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    targets, weights = model.targets(logits)
    assert logits.softmax(-1)[0].argmax() == 0 and targets[0].argmax() == 1 and weights[0] == 1
    skewed = build("fixmatch", threshold=0.5, alignment_momentum=0.9)
    skewed.alignment.labeled.copy_(logits.softmax(-1).mean(0))  # what the model guesses is what the labels say
    assert skewed.targets(logits)[0][0].argmax() == 0
