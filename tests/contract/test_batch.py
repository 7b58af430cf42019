"""A batch that is too small to learn from is refused in a sentence, before the first step; one that is not, trains."""

import pytest
import torch

from hf_ssl import SSLTrainer, SSLTrainingArguments, distributed
from hf_ssl.data import load_source
from hf_ssl.methods import METHODS, load
from tests.contract.tiny import RESNET, TINY, VIT, batch, build, processor

every_method = pytest.mark.parametrize("name", sorted(METHODS))
# What one image can teach a ViT: the others need negatives, statistics or a distribution.
ALONE = {"dino", "fixmatch", "infomin", "instdisc", "mae", "moco", "obow", "pirl", "ressl"}
OVER_RANKS = {  # what the loss compares is gathered: one image of each of two ranks is enough for it
    "barlow_twins", "clip", "dcl", "deepcluster_v2", "dinov2", "dinov3", "lejepa", "mocov3", "msn", "nnclr", "pmsn",
    "sela_v2", "simclr", "simclr_v2", "swav", "vicreg", "vicregl", "w_mse",
}  # fmt: skip
WORDS = r"needs at least 2 images in the batch of (all ranks|every rank), got 1: .+ Raise per_device_train_batch_size"


def test_every_method_is_in_one_list() -> None:
    """BYOL, SimSiam and TiCo compare no images, but have BatchNorm."""
    assert ALONE.isdisjoint(OVER_RANKS) and set(METHODS) - ALONE - OVER_RANKS == {"byol", "simsiam", "tico"}


@every_method
@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_batch_of_one_image(name: str, backbone: dict) -> None:
    if backbone is RESNET and not TINY[name].takes_resnet:
        return
    model = build(name, backbone)
    if name in ALONE and (backbone is VIT or name == "fixmatch"):  # FixMatch's batch has unlabelled images as well
        loss = model(**batch(name, 1)).loss
        loss.backward()
        assert loss.isfinite() and loss.detach() > 0
        assert any(p.grad is not None and p.grad.abs().max() > 1e-6 for p in model.backbone.parameters())
    else:
        with pytest.raises(ValueError, match=WORDS):
            model(**batch(name, 1))


@every_method
def test_a_batch_of_two_trains(name: str) -> None:
    loss = build(name)(**batch(name, 2)).loss
    loss.backward()
    assert loss.isfinite() and loss.detach().abs() > 1e-6


@every_method
def test_ranks_count_together_where_the_loss_gathers(name: str) -> None:
    """Without BatchNorm, or with BatchNorm over all ranks, one image of each of two ranks is a batch of two."""
    model = build(name)
    has_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.batch_statistics())
    if has_norm:
        with pytest.raises(ValueError, match="BatchNorm"):
            model.check_batch(1, ranks=2)
        distributed.synchronise_batchnorm(model)
    model.check_batch(1, ranks=2)
    if name in OVER_RANKS:
        with pytest.raises(ValueError, match="of all ranks"):
            model.check_batch(1, ranks=1)
    model.eval().check_batch(1, ranks=2)


def test_w_mse_needs_more_images_than_dimensions() -> None:
    """Whitening 8 dimensions takes 9 images where nothing is added to their covariance, and equal sub-batches."""
    model = build("w_mse", projection_dim=8, sub_batch=12, epsilon=1e-6)
    with pytest.raises(ValueError, match=r"at least 9 images in the batch of all ranks, got 8: .*projection_dim=8"):
        model(**batch("w_mse", 8))
    assert model(**batch("w_mse", 9)).loss.isfinite()
    with pytest.raises(ValueError, match="25 images into 2 equal sub-batches"):
        model.check_batch(25)


def test_dinov2_without_its_spread_takes_one_image() -> None:
    assert build("dinov2", koleo_weight=0.0)(**batch("dinov2", 1)).loss.isfinite()
    with pytest.raises(ValueError, match="KoLeo"):
        build("dinov2")(**batch("dinov2", 1))
    with pytest.raises(ValueError, match="shared out"):
        build("dinov3", koleo_weight=0.0)(**batch("dinov3", 1))


@pytest.mark.parametrize("name", sorted(set(METHODS) - ALONE - {"clip"}))
def test_the_trainer_refuses_it_at_the_start(name: str, tmp_path) -> None:
    """Whatever the accumulation, and in whatever mode the model comes."""
    arguments = SSLTrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=1, use_cpu=True
    )
    made, source = processor(name), load_source("emoji")
    with pytest.raises(ValueError, match=WORDS):
        SSLTrainer(build(name).eval(), arguments, source, made)


def test_every_batch_of_a_pass_is_whole(tmp_path) -> None:
    """Nine images in batches of four: the last one is not trained on alone, which BatchNorm could not do."""
    source = load_source("emoji")
    source.dataset = source.dataset.select(range(9))
    arguments = SSLTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = SSLTrainer(build("simsiam"), arguments, source, load("simsiam").processor_class(size=16))
    sizes = [len(views["pixel_values"]) for views in trainer.get_train_dataloader()]
    assert sizes == [4, 4]
