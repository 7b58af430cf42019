"""Learning rates by parameter, clipping by module: what DINOv2 asks of the optimiser, exact on resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_ssl.training import SSLTrainer, SSLTrainingArguments
from hf_ssl.training.arguments import ModelArguments
from hf_ssl.training.build import build_method
from hf_ssl.training.optim import clip_per_module, mark_groups
from tests.contract.tiny import build, processor
from tests.invariants.test_trainer_accumulates import source


def test_groups_are_split_by_rate_and_keep_their_decay() -> None:
    a, b, c, d = (nn.Parameter(torch.ones(2)) for _ in range(4))
    optimizer = torch.optim.AdamW(
        [{"params": [a, b], "weight_decay": 0.1}, {"params": [c, d], "weight_decay": 0.0}], 0.5
    )
    mark_groups(optimizer, decayed=[a, b], constant=[], rates=[(a, 0.5), (c, 0.1), (d, 0.1)])
    found = {id(p): (group["lr"], group["weight_decay"], group["decayed"])
             for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
    assert [found[id(p)] for p in (a, b, c, d)] == [
        (0.25, 0.1, True), (0.5, 0.1, True), (0.05, 0.0, False), (0.05, 0.0, False),
    ]  # fmt: skip
    assert len(optimizer.param_groups) == 3


def test_each_module_is_clipped_on_its_own() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(3, 3), "head": nn.Linear(3, 3), "teacher": nn.Linear(3, 3)})
    for name, size in (("backbone", 100.0), ("head", 0.01)):
        for parameter in model[name].parameters():
            parameter.grad = torch.full_like(parameter, size)
    clip_per_module(model, 3.0)
    norms = [torch.cat([p.grad.flatten() for p in model[name].parameters()]).norm() for name in ("backbone", "head")]
    assert norms[0] == pytest.approx(3.0, rel=1e-5)  # of weight and bias together
    assert norms[1] == pytest.approx(0.01 * 12**0.5, rel=1e-5)  # small ones are left alone
    assert model["teacher"].weight.grad is None


def train(folder: Path, resume: bool = False, steps: int = 4) -> tuple[SSLTrainer, dict[str, Tensor]]:
    """A run of 4 steps in which every schedule moves; ``steps`` ends it early, with a checkpoint, for ``resume``."""
    model = build("dinov2", freeze_last_layer=0.3, teacher_momentum=0.5)
    args = SSLTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad_per_module=0.5, max_grad_norm=0.0, logging_steps=1,
        save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, seed=3,
    )  # fmt: skip
    trainer = SSLTrainer(model=model, args=args, train_source=source(), processing_class=processor("dinov2"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer, {key: value.clone() for key, value in model.state_dict().items()}


def test_a_resumed_run_has_the_same_rates_masks_and_weights(tmp_path: Path) -> None:
    trainer, whole = train(tmp_path)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    resumed, again = train(tmp_path, resume=True)
    for key, value in whole.items():
        assert torch.equal(again[key], value), key
    assert rates == {group["lr"] for group in resumed.optimizer.param_groups}
    check_rates(resumed)


def check_rates(trainer: SSLTrainer) -> None:
    """The schedule scales every rate alike."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    shares = sorted({round(group["initial_lr"] / 1e-2, 6) for group in optimizer.param_groups})
    assert shares == [round(x, 6) for x in (0.2 * 0.9**3, 0.9**3, 0.9**2, 0.9, 1.0)]
    factors = {round(group["lr"] / group["initial_lr"], 6) for group in optimizer.param_groups}
    assert len(factors) == 1 and len(scheduler.base_lrs) == len(optimizer.param_groups)
    by_parameter = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter, share in trainer.method.learning_rates():
        assert by_parameter[id(parameter)] == pytest.approx(1e-2 * share)


@pytest.mark.parametrize(("method", "backbone", "size", "local"), [
    ("dinov2", "dinov2-nano", 32, 12), ("dinov3", "dinov3-nano", 64, 32),
])  # fmt: skip
def test_presets_fit_the_pictures_and_a_run_goes_on(tmp_path: Path, method, backbone, size, local) -> None:
    """Patch size and small crops follow the image size; a checkpoint as the backbone brings all of the method."""
    fields = {"out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    model, made = build_method(method, source(), ModelArguments(backbone=backbone, image_size=size), fields)
    config = model.config.backbone_config
    patch = 4 if size < 48 else 8
    assert (config.image_size, config.patch_size, config.num_register_tokens) == (size, patch, 4)
    assert made.size == {"height": size, "width": size}
    assert next(group["size"] for group in made.views if group["key"] == "local_pixel_values") == local
    model.step.fill_(7)
    model.save_pretrained(tmp_path / "ssl")
    weights = {"koleo_weight": 0.0} if method == "dinov2" else {"gram_weight": 2.0}
    again, _ = build_method(
        method, source(), ModelArguments(backbone=str(tmp_path / "ssl"), image_size=size), {**weights}, seed=5
    )
    assert again.config.out_dim == 16 and getattr(again.config, next(iter(weights))) == next(iter(weights.values()))
    assert int(again.step) == 0
    assert again.backbone.config.name_or_path == str(tmp_path / "ssl")  # what header and card say it started from
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()  # and nobody's paths are published
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert key == "step" or torch.equal(state[key], value), key
