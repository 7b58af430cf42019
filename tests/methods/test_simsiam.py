import dataclasses

import pytest
import torch
from torch import nn

from hf_ssl import SSLTrainer, SSLTrainingArguments
from hf_ssl.data import load_source
from hf_ssl.losses import negative_cosine, spread
from hf_ssl.methods.joint_embedding.simsiam import SimSiamForPreTraining
from hf_ssl.training.optim import hold_constant_rates
from tests.contract.tiny import RESNET, batch, build, processor
from tests.invariants import test_collapse as small

HEADS = {"projection_dim": 64, "bottleneck_dim": 16}


def by_hand(predictions: list, targets: list) -> float:
    """½ · mean −cos(p₁, z₂) + ½ · mean −cos(p₂, z₁), a row at a time."""
    total = 0.0
    for p, z in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        total += 0.5 * sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(p, z, strict=True)) / len(p)
    return -total


def test_the_whole_step_is_what_the_paper_draws() -> None:
    """Each view alone through encoder and predictor; it predicts the other view's projection."""
    model, twin = build("simsiam", RESNET), build("simsiam", RESNET)
    views = batch("simsiam")["pixel_values"]
    with torch.no_grad():
        z = [twin.projector(twin.features(view)) for view in views.unbind(1)]
        p = [twin.predictor(rows) for rows in z]
    assert float(model(views).loss) == pytest.approx(by_hand(p, z), rel=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_no_gradient_flows_through_the_target() -> None:
    """With a predictor that says nothing of its input, the encoder has nothing to learn from."""
    model = build("simsiam", RESNET)
    with torch.no_grad():
        model.predictor[0].weight.zero_()
        model.predictor[3].bias.normal_()
    model(**batch("simsiam")).loss.backward()
    assert all(p.grad.abs().max() == 0 for p in model.projector.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.backbone.parameters())
    assert model.predictor[3].bias.grad.abs().max() > 0


def test_heads() -> None:
    model = build("simsiam", hidden_dim=24)
    kinds = [type(layer) for layer in model.projector]
    inner = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*inner, *inner, nn.Linear, nn.BatchNorm1d] and not model.projector[-1].affine
    linears = [layer for layer in model.projector if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [24, 24, 16]
    assert all(layer.bias is None for layer in linears)
    assert [type(layer) for layer in model.predictor] == [*inner, nn.Linear]
    assert model.predictor[0].bias is None and model.predictor[3].bias is not None
    assert model.predictor[0].out_features == 8
    assert len(build("simsiam", num_layers=2).projector) == 5


# --- the predictor's learning rate ----------------------------------------------------------------------------------


def trainer(folder, steps: int = 6, fixed: bool = True, **arguments) -> SSLTrainer:
    source = load_source("emoji")
    source = dataclasses.replace(source, dataset=source.dataset.select(range(64)))
    model = build("simsiam", RESNET, fix_predictor_rate=fixed)
    defaults = {
        "per_device_train_batch_size": 16, "max_steps": steps, "learning_rate": 0.05, "warmup_steps": 2,
        "weight_decay": 1e-3, "optim": "sgd_momentum", "save_steps": 3, "logging_steps": 3, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "health_steps": 0, "precision": "fp32",
    }  # fmt: skip
    return SSLTrainer(
        model, SSLTrainingArguments(str(folder), **{**defaults, **arguments}), source, processor("simsiam")
    )


def rates(trainer: SSLTrainer) -> dict[str, list[float]]:
    """Learning rate of every parameter at every step of a run."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen: dict[str, list[float]] = {name: [] for name in names.values()}
    step = trainer.create_optimizer().step

    def watched(*args, **kwargs):
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                seen[names[id(parameter)]].append(group["lr"])
        return step(*args, **kwargs)

    trainer.optimizer.step = watched
    trainer.train()
    return {name: values for name, values in seen.items() if values}


@pytest.mark.parametrize("schedule", ["cosine_with_min_lr", "linear"])
def test_the_predictor_keeps_its_learning_rate_and_the_rest_follows(tmp_path, schedule: str) -> None:
    seen = rates(trainer(tmp_path, lr_scheduler_type=schedule, save_strategy="no"))
    for name, values in seen.items():
        if name.startswith("predictor."):
            assert values == [0.05] * 6, name  # from the first step: warm-up is part of the schedule
        else:
            assert values[0] == 0 and values[2] == pytest.approx(0.05) and values[5] < 0.03, name


def test_without_the_field_the_predictor_follows_too(tmp_path) -> None:
    seen = rates(trainer(tmp_path, fixed=False, save_strategy="no"))
    assert seen["predictor.0.weight"] == seen["projector.0.weight"]


def test_groups_hold_every_parameter_once_and_decay_as_before(tmp_path) -> None:
    made = trainer(tmp_path, optim="lars")
    optimizer = made.create_optimizer()
    assert made.create_optimizer() is optimizer
    kinds = [(group["decayed"], group["constant_rate"], group["weight_decay"], group["always_adapt"])
             for group in optimizer.param_groups]  # fmt: skip
    assert kinds == [(True, False, 1e-3, True), (False, False, 0.0, False), (True, True, 1e-3, True),
                     (False, True, 0.0, False)]  # fmt: skip
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in made.model.parameters() if p.requires_grad)


def test_a_resumed_run_keeps_the_rate_and_ends_bit_equal(tmp_path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "last")
    again.train(resume_from_checkpoint=True)
    for group in again.optimizer.param_groups:
        assert (group["lr"] == 0.05) == group["constant_rate"]
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name]), name


def test_a_schedule_without_factors_is_refused_in_words(tmp_path) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer(tmp_path).create_optimizer())
    with pytest.raises(ValueError, match="ReduceLROnPlateau cannot leave out the parameters"):
        hold_constant_rates(plateau)
    hold_constant_rates(torch.optim.lr_scheduler.ReduceLROnPlateau(trainer(tmp_path, fixed=False).create_optimizer()))


# --- collapse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_embeddings_stay_spread(seed: int) -> None:
    model, logged = small.train("simsiam", seed, small.RESNET, **HEADS)
    standard, rank = small.health(model)
    assert standard > 0.5 and rank > 28
    assert logged[-1]["target_spread"] > 0.9  # seen: .94 and .98
    assert logged[-1]["loss"] < -0.3  # untrained about 0; seen: −.56 and −.58, on torch 2.6 −.36


def test_without_its_stop_gradient_it_collapses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stop-gradient is for, and proof that the measure above sees a collapse (section 4.1).

    The last BatchNorm forces a variance upon every channel: all but a few images end in one direction, those few far
    on the other side.
    """

    def leaky(self: SimSiamForPreTraining, embeddings, pixel_values):
        batch = len(pixel_values)
        projections = self.project(self.projector, embeddings, batch)
        predictions = self.project(self.predictor, projections, batch)
        return negative_cosine(predictions, projections.roll(batch, 0)), {"target_spread": spread(projections)}

    spreads = {}
    for stopped in (True, False):
        if not stopped:
            monkeypatch.setattr(SimSiamForPreTraining, "objective", leaky)
        logged = small.train("simsiam", 0, small.RESNET, lr=1e-2, **HEADS)[1]
        spreads[stopped] = logged[-1]["target_spread"]
    assert spreads[True] > 0.9 and spreads[False] < 0.8  # seen: .98 and below .6, on torch 2.8 .99 and .70
