"""DINOv2 by hand, and what its peers got wrong."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from hf_ssl import backbones, distributed
from hf_ssl.losses import koleo, patch_loss
from hf_ssl.masks import crop_masks, masked_positions
from tests.contract.tiny import DINOV2, DINOV3, VIT, adamw, batch, build, train_step
from tests.invariants.test_collapse import health, train

NATIVE = pytest.mark.parametrize("backbone", [VIT, DINOV2, DINOV3], ids=["vit", "dinov2", "dinov3"])


def test_the_loss_by_hand() -> None:
    """Loops over images, crops and patches, no batching; softmax centring with a centre that is not zero."""
    model = build("dinov2", koleo_weight=0.3, patch_weight=0.7, warmup_teacher_temperature=0.07)
    model.center.value.normal_(std=0.1)
    model.patch_center.value.normal_(std=0.1)
    model.mask_token.data.normal_(std=0.5)
    views = batch("dinov2", 3)
    large, small, masks = views["pixel_values"], views["local_pixel_values"], views["masks"]

    def one(whose: str, image: torch.Tensor, masked: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        masked = None if masked is None else masked[None]
        token = model.mask_token if masked is not None else None
        cls, patches = backbones.class_and_patch_tokens(getattr(model, f"{whose}backbone"), image[None], masked, token)
        return cls[0], patches[0]

    def entropy(target: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return -(target * F.log_softmax(model.head(features) / 0.1, dim=-1)).sum()

    crops, patches, spread = torch.zeros(()), torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        classes = [[one("", large[b, v], masks[b, v])[0] for v in range(2)] for b in range(3)]
        for b in range(3):
            for t in range(2):
                cls, tokens = one("teacher_", large[b, t])
                target = F.softmax((model.teacher_head(cls) - model.center.value[0]) / 0.07, dim=-1)
                crops += entropy(target, classes[b][1 - t]) / 3
                crops += sum(entropy(target, one("", small[b, v])[0]) for v in range(2)) / 3
                hidden = masks[b, t].nonzero()[:, 0]
                seen = one("", large[b, t], masks[b, t])[1]
                for place in hidden:
                    logits = model.teacher_head(tokens[place]) - model.patch_center.value[0]
                    patches += entropy(F.softmax(logits / 0.07, dim=-1), seen[place]) / len(hidden) / 6
        for v in range(2):
            rows = [F.normalize(classes[b][v], dim=0) for b in range(3)]
            nearest = [min((a - other).norm() for j, other in enumerate(rows) if j != i) for i, a in enumerate(rows)]
            spread -= torch.stack(nearest).log().mean()
    wanted = crops / (2 + 2 * 2) + 0.7 * patches + 0.3 * spread
    output = model(**views)
    torch.testing.assert_close(output.loss.detach(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.metrics["patch_loss"], patches, rtol=1e-5, atol=1e-5)


@NATIVE
def test_the_student_does_not_see_masked_patches_and_the_teacher_does(backbone: dict) -> None:
    """Other pixels under the mask change nothing for the student; registers and the class token are no patches."""
    model = build("dinov2", backbone).eval()
    assert (model.mask_token is None) == (backbone is not VIT)
    views = batch("dinov2", 2)["pixel_values"]
    masked = torch.zeros(4, 16, dtype=torch.bool)
    masked[:, 0] = masked[:, 15] = True
    painted = views.clone()
    painted[..., :4, :4] = painted[..., 12:, 12:] = 3.0
    with torch.no_grad():
        whole = model.tokens(model.backbone, views, masked)
        assert whole.patches.shape == (4, 16, 16) and whole.cls.shape == (4, 16)
        for mine, other in zip(whole, model.tokens(model.backbone, painted, masked)):
            torch.testing.assert_close(mine, other)
        seen, repainted = (model.tokens(model.teacher_backbone, pixels).cls for pixels in (views, painted))
        assert (seen - repainted).abs().max() > 1e-3


@NATIVE
def test_the_teacher_is_published_as_a_native_model(backbone: dict, tmp_path) -> None:
    model = build("dinov2", backbone)
    train_step(model, adamw(model), batch("dinov2"))
    model.export_backbone.save_pretrained(tmp_path)
    plain, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and all(key.startswith("pooler.") for key in report["missing_keys"])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(images).last_hidden_state[:, 0], model.eval().features(images))


def test_koleo_spreads_features_before_the_head() -> None:
    """lightly-train PR#141: behind the head's normalisation its gradient cancels."""
    gradients = []
    for weight in (0.0, 1.0):
        model = build("dinov2", koleo_weight=weight)
        model(**batch("dinov2")).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    without, with_it = gradients
    assert all(torch.allclose(with_it[name], without[name], atol=1e-6) for name in without if name.startswith("head."))
    moved = with_it["backbone.layernorm.weight"] - without["backbone.layernorm.weight"]
    assert moved.abs().max() > 1e-3


def test_koleo_of_equal_images_and_in_half_precision_is_finite() -> None:
    """dinov2#143: the log of a distance of 0, or of one that half precision rounds to 0."""
    x = torch.randn(4, 8)
    x[1] = x[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = x.detach().clone().to(dtype).detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = koleo(rows)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and rows.grad.isfinite().all()
        assert loss < 10  # two of four at 1e-8: no more than 18.4 each
    torch.testing.assert_close(koleo(x), koleo(7 * x))  # of directions alone
    with pytest.raises(ValueError, match="more than 1 images in the global batch"):
        koleo(x[:1])


def test_sinkhorn_targets_of_huge_logits_are_probabilities() -> None:
    """dinov2 PR#583: exp(logit / temperature) overflows."""
    model = build("dinov2", centering="sinkhorn")
    logits = 500 * torch.randn(6, 12)
    targets = model.center_logits(logits, "center")
    assert targets.isfinite().all() and torch.allclose(targets.sum(1), torch.ones(6))
    assert torch.equal(targets, distributed.sinkhorn(logits, 0.04, 3))
    assert model.center_logits(logits[:0], "patch_center").shape == (0, 12)  # a rank that masked nothing


def test_the_frozen_last_layer_is_the_students() -> None:
    """lightly#1596: the teacher has no gradient to drop; frozen there, the student's prototypes would still move."""
    model = build("dinov2", freeze_last_layer=0.5, separate_heads=True, patch_out_dim=10, teacher_momentum=0.0)
    model.total_steps.fill_(4)
    optimizer = adamw(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        train_step(model, optimizer, batch("dinov2"))
    for name, parameter in model.named_parameters():
        frozen = "last_layer" in name
        assert torch.equal(parameter, before[name]) == frozen, name
    train_step(model, optimizer, batch("dinov2"))
    for whose in ("", "teacher_"):
        for head in ("head", "patch_head"):
            name = f"{whose}{head}.last_layer.weight_v"
            assert not torch.equal(model.get_parameter(name), before[name])


def test_one_large_crop_is_refused() -> None:
    """lightly#1938: nothing to compare with gives NaN."""
    views = batch("dinov2")
    with pytest.raises(ValueError, match="DINOv2 compares exactly 2 views per image, got 1"):
        build("dinov2")(views["pixel_values"][:, :1])
    assert build("dinov2")(views["pixel_values"], masks=views["masks"]).loss.isfinite()  # no small crops


def test_half_of_the_crops_are_masked_by_stratified_ratios() -> None:
    """One of two crops in every image; of four, two, one of the smaller ratios and one of the larger."""
    rng = np.random.default_rng(0)
    pairs = np.stack([crop_masks(rng, 2, (14, 14), 0.5, (0.1, 0.5)).sum(1) for _ in range(200)])
    assert ((pairs > 0).sum(1) == 1).all()
    assert 70 < (pairs[:, 0] > 0).sum() < 130  # whichever
    shares = pairs.max(1) / 196
    assert 0.1 - 0.04 < shares.min() < 0.13 and 0.45 < shares.max() <= 0.5 and abs(shares.mean() - 0.3) < 0.03
    for _ in range(20):
        low, high = np.sort(crop_masks(rng, 4, (14, 14), 0.5, (0.1, 0.5)).sum(1))[2:]
        assert 19 - 6 <= low <= 58 and 58 - 6 <= high <= 98  # the generator may stop a few short, never beyond


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_masked_crops_holds_on_average(share: float) -> None:
    rng = np.random.default_rng(0)
    masked = np.stack([crop_masks(rng, 2, (4, 4), share, (0.1, 0.5)).any(1) for _ in range(1000)])
    assert masked.mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 3)])
def test_a_masked_crop_always_has_a_masked_patch(grid: tuple[int, int]) -> None:
    """lightly#1585, #2041: a ratio of few patches rounds to a mask of none; the class token is no patch."""
    rng = np.random.default_rng(0)
    masks = np.concatenate([crop_masks(rng, 2, grid, 0.5, (0.1, 0.5)) for _ in range(8)])
    assert masks.shape == (16, grid[0] * grid[1]) and masks.any(1).sum() == 8
    places, weights = masked_positions(masks)
    assert np.array_equal(np.flatnonzero(masks), places) and math.isclose(float(weights.sum()), 8, rel_tol=1e-6)


def test_without_given_masks_torchs_generator_decides() -> None:
    model, views = build("dinov2"), batch("dinov2")
    views.pop("masks")
    state = torch.get_rng_state()
    losses = [model(**views).loss for _ in range(2)]
    torch.set_rng_state(state)
    assert losses[0] == model(**views).loss != losses[1]


def test_patches_of_an_image_share_its_weight() -> None:
    """An image with one masked patch counts as much as one with three, and one with none counts as an image."""
    student = torch.randn(4, 5)
    targets = F.softmax(torch.randn(4, 5), dim=-1)
    entropy = -(targets * F.log_softmax(student / 0.1, dim=-1)).sum(-1)
    masks = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    _, weights = masked_positions(masks)
    wanted = (entropy[0] + entropy[1:].mean()) / 3
    torch.testing.assert_close(patch_loss(student, targets, weights, 3, 0.1), wanted)


@NATIVE
def test_learning_rates_fall_towards_the_first_block(backbone: dict) -> None:
    model = build("dinov2", backbone)
    names = {id(parameter): name for name, parameter in model.backbone.named_parameters()}
    rates = {names[id(parameter)]: rate for parameter, rate in model.learning_rates()}
    assert set(rates) == set(names.values())
    for name, rate in rates.items():
        block = 1 if ".1." in name else 0 if ".0." in name else None
        exponent = 3 if name.startswith("embeddings.") else 0 if block is None else 2 - block
        assert rate == pytest.approx(0.9**exponent * (0.2 if "patch_embeddings" in name else 1.0)), name


def test_it_does_not_collapse_and_koleo_is_why() -> None:
    fields = {
        "out_dim": 64, "hidden_dim": 64, "bottleneck_dim": 16, "teacher_momentum": 0.9, "layer_decay": 1.0,
        "patch_embedding_rate": 1.0,
    }  # fmt: skip
    model, logged = train("dinov2", 0, VIT, **fields)
    spread, rank = health(model)  # seen: 0.38 and 5.3; untrained 0.02 and 1.4
    assert spread > 0.2 and rank > 3
    assert 1.0 < logged[-1]["teacher_entropy"] < 0.99 * math.log(64) and logged[-1]["prototype_entropy"] > 2.5
    model, _ = train("dinov2", 0, VIT, **fields, koleo_weight=0.0)
    assert health(model)[0] < 0.1
