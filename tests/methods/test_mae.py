import pytest
import torch

from hf_ssl import masks
from hf_ssl.backbones import sincos_2d
from hf_ssl.methods.masked.mae import MAEConfig, MAEForPreTraining, _check_positions, masked_pixel_loss
from tests.contract.tiny import VIT, batch, build, pictures, processor


def test_loss_by_hand_over_removed_patches_only() -> None:
    prediction, target = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    wanted = ((prediction - target)[0, [0, 2]] ** 2).mean()
    torch.testing.assert_close(masked_pixel_loss(prediction, target, mask, False), wanted)
    prediction[0, 1] = 1e3  # what is visible is not judged
    torch.testing.assert_close(masked_pixel_loss(prediction, target, mask, False), wanted)
    normalised = masks.normalise_patches(target)
    assert masked_pixel_loss(normalised, target, mask, True) < 1e-12


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.6, 6), (0.9, 1)])
def test_mask_ratio_counts_patches_not_the_class_token(ratio: float, kept: int) -> None:
    model = build("mae", mask_ratio=ratio)
    _, mask, latent = model.predict(torch.randn(2, 3, 16, 16))
    assert latent.shape == (2, 1 + kept, 16) and (mask.sum(1) == 16 - kept).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio must lie between 0 and 1"):
        MAEConfig(backbone_config=dict(VIT), mask_ratio=ratio)


def test_positions_are_fixed_distinct_and_not_zero(tmp_path) -> None:
    """transformers' own from-scratch ViTMAE has all-zero tables."""
    model = build("mae")
    model.save_pretrained(tmp_path)
    for candidate in (model, MAEForPreTraining.from_pretrained(tmp_path).train()):
        for table in (candidate.backbone.embeddings.position_embeddings, candidate.decoder_positions):
            assert torch.equal(table[0], sincos_2d(table.shape[-1], 4, prefix=1))
            assert not table.requires_grad
    for broken in (torch.zeros(5, 8), torch.ones(5, 8)):
        with pytest.raises(ValueError, match="non-zero and pairwise distinct"):
            _check_positions(broken)


def test_the_encoder_starts_as_published(tmp_path) -> None:
    """Xavier-uniform linears and patch embedding (facts C, official code), where a native ViT has N(0, .02)."""
    model = build("mae")
    weights = dict(model.backbone.named_parameters())
    drawn = {n: w.flatten(1) for n, w in weights.items() if w.ndim in (2, 4)}
    assert len(drawn) > 6
    for name, weight in drawn.items():
        fused = 3 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else 1  # one matrix, published
        bound = (6 / (fused * len(weight) + weight.shape[1])) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
    model.save_pretrained(tmp_path)  # and what was trained is never drawn again
    again = dict(MAEForPreTraining.from_pretrained(tmp_path).backbone.named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_learned_positions_stay_trainable_if_asked() -> None:
    model = build("mae", fixed_positions=False)
    positions = model.backbone.embeddings.position_embeddings
    model(**batch("mae")).loss.backward()
    assert positions.requires_grad and positions.grad.any()
    assert not torch.equal(positions[0], sincos_2d(16, 4, prefix=1))


def test_every_removed_patch_gets_a_prediction_of_its_own() -> None:
    prediction, mask, _ = build("mae").predict(torch.randn(1, 3, 16, 16))
    removed = prediction[0, mask[0].bool()]
    assert len(removed) == 12 and torch.pdist(removed).min() > 1e-4


def test_noise_decides_the_mask_and_is_drawn_per_image_if_not_given() -> None:
    model, images = build("mae"), torch.randn(4, 3, 16, 16)
    noise = torch.rand(4, 16)
    assert torch.equal(model.predict(images, noise)[1], model.predict(images, noise)[1])
    assert len(model.predict(images)[1].unique(dim=0)) > 1
    keep, _, mask = masks.random_masking(noise, 4)
    assert torch.equal(model.predict(images, noise)[1], mask)
    assert all((mask[row, kept] == 0).all() for row, kept in enumerate(keep))


def test_what_is_removed_cannot_leak_into_the_latent() -> None:
    model, noise = build("mae").eval(), torch.rand(1, 16)
    images = torch.randn(1, 3, 16, 16)
    prediction, mask, latent = model.predict(images, noise)
    patches = masks.patchify(images, 4)
    changed = masks.unpatchify(patches + 9 * mask[..., None], 4, 16, 16)
    again = model.predict(changed, noise)
    assert torch.equal(again[2], latent) and torch.equal(again[0], prediction)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_keeps_what_was_seen(norm_pix: bool) -> None:
    model, noise, images = build("mae", norm_pix_loss=norm_pix).eval(), torch.rand(2, 16), torch.randn(2, 3, 16, 16)
    seen, pasted = model.reconstruct(images, noise)
    mask = masks.random_masking(noise, 4)[2].bool()
    parts = [masks.patchify(picture, 4) for picture in (images, seen, pasted)]
    assert torch.equal(parts[0][~mask], parts[1][~mask]) and torch.equal(parts[0][~mask], parts[2][~mask])
    assert not parts[1][mask].any()
    if norm_pix:  # the true patches' mean and contrast, the predicted pattern
        prediction = model.predict(images, noise)[0][mask]
        pattern = (parts[2][mask] - parts[0][mask].mean(-1, keepdim=True)) / (
            parts[0][mask].var(-1, keepdim=True) + 1e-6
        ).sqrt()
        torch.testing.assert_close(pattern, prediction, rtol=1e-4, atol=1e-4)


def test_one_image_can_be_learned_by_heart() -> None:
    """With working positions the loss goes to nothing; with zero tables it stalls far above."""
    wide = {**VIT, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
    model = build("mae", wide, decoder_hidden_size=48, decoder_num_layers=2, decoder_intermediate_size=96)
    images = processor("mae")(pictures(1, seed=4), seed=0)["pixel_values"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, 600)
    views = images.expand(4, -1, -1, -1, -1)
    for _ in range(600):
        optimizer.zero_grad()
        loss = model(views).loss
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss < 1e-3


def test_training_predicts_the_removed_patches_and_nothing_is_lost_by_it() -> None:
    model, images, noise = build("mae"), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    prediction, mask, _ = model.predict(images, noise)
    wanted = masked_pixel_loss(prediction, masks.patchify(images, 4), mask, True)
    shapes = []
    model.decoder.predict.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    torch.testing.assert_close(model(images[:, None], noise).loss, wanted)
    assert shapes == [(2, 12, 48)]
