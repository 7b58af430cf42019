import torch
from torch import Tensor

from hf_ssl import schedules
from hf_ssl.methods.joint_embedding.byol import BYOLConfig, BYOLForPreTraining, byol_loss
from hf_ssl.training.optim import scaled_learning_rate
from tests.golden.harness import Case, gradients, runner
from tests.golden.runners.dino import small_vit


@runner("byol/loss")
def loss(case: Case) -> dict[str, Tensor]:
    first, second = case.input("p0").requires_grad_(), case.input("p1").requires_grad_()
    value = byol_loss(torch.cat([first, second]), torch.cat([case.input("z0"), case.input("z1")]))
    return {"loss": value, **{f"grad.{name}": g for name, g in gradients(value, p0=first, p1=second).items()}}


@runner("byol/jax")
def official(case: Case) -> dict[str, Tensor]:
    names = ("prediction_view1", "prediction_view2")
    predictions = {name: case.input(name).requires_grad_() for name in names}
    targets = [case.input(name) for name in ("target_projection_view1", "target_projection_view2")]
    value = byol_loss(torch.cat([*predictions.values()]), torch.cat(targets))
    got = {"loss": value, **{f"grad.{name}": grad for name, grad in gradients(value, **predictions).items()}}
    s = case.config["sched"]
    model = BYOLForPreTraining(
        BYOLConfig(backbone_config=small_vit(8), projection_dim=4, hidden_dim=4, teacher_momentum=s["base_ema"])
    )
    peak = scaled_learning_rate(s["base_lr"], model.lr_scaling, s["batch_size"])
    shares = [step / s["max_steps"] for step in s["steps"]]
    warmup = s["warmup_steps"] / s["max_steps"]
    got["target_ema"] = torch.tensor([model.teacher_momentum(share) for share in shares])
    got["learning_rate"] = torch.tensor([schedules.warmup_cosine(share, peak, 0.0, warmup) for share in shares])
    return got
