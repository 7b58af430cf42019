from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.heads import MLPHead
from hf_ssl.losses import info_nce_logits
from hf_ssl.methods.joint_embedding.moco import MoCoConfig, MoCoForPreTraining
from hf_ssl.momentum import ema_update
from tests.golden.harness import Case, runner
from tests.golden.runners.dino import small_vit


class Body(nn.Module):
    """The cases' toy backbone, Linear and ReLU, shaped as a native model is; its "images" are vectors (B, D, 1, 1)."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.body = nn.Linear(inner, outer)

    def forward(self, pixel_values: Tensor) -> Any:
        return Hidden(self.body(pixel_values.flatten(1)).relu()[:, :, None, None])


class Hidden:
    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state


def as_views(case: Case, *names: str) -> Tensor:
    """Inputs (B, D) each -> (B, V, D, 1, 1)."""
    return torch.stack([case.input(name) for name in names], dim=1)[..., None, None]


def our_name(official: str, head: MLPHead) -> str:
    """A name within official ``encoder_q`` or ``encoder_k`` -> within our backbone or projector."""
    part, rest = official.split(".", 1)
    if part == "body":
        return f"backbone.body.{rest}"
    if "." not in rest:  # one layer: fc.weight
        return f"projector.{len(head) - 1}.{rest}"
    return f"projector.{rest}"


@runner("moco/v")
def sequence(case: Case) -> dict[str, Tensor]:
    """The official order is key encoder, keys, optimiser; ours optimiser, key encoder: one EMA comes beforehand."""
    c, sgd = case.config, case.config["sgd"]
    official = c["moco"]
    config = MoCoConfig(
        backbone_config=small_vit(c["hidden"]), projection_dim=official["dim"], num_layers=1 + official["mlp"],
        temperature=official["T"], queue_size=official["K"], teacher_momentum=official["m"],
    )  # fmt: skip
    model = MoCoForPreTraining(config)
    model.backbone, model.teacher_backbone = Body(c["din"], c["hidden"]), Body(c["din"], c["hidden"])
    sides = {"encoder_q": "", "encoder_k": "teacher_"}
    for side, prefix in sides.items():
        named = case.part(f"weight.{side}").items()
        weights = {prefix + our_name(key, model.projector): value for key, value in named}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        unfilled = [key for key in missing if key.startswith((f"{prefix}backbone", f"{prefix}projector"))]
        assert not unexpected and not unfilled, (unexpected, unfilled)
    model.queue.rows.copy_(case.tensors["weight.queue"].T)
    model.queue.pointer.copy_(case.tensors["weight.queue_ptr"][0])
    model.train()
    for student, teacher in model.teachers():
        ema_update(student, teacher, official["m"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **sgd)
    got: dict[str, Tensor] = {}

    def record(step: int, side: str, what: str, values: dict[str, Tensor]) -> None:
        for key in case.part(f"weight.{side}"):
            got[f"{what}.{key}"] = values[sides[side] + our_name(key, model.projector)].clone()

    sent: list[Tensor] = []
    model.projector.register_forward_hook(lambda module, args, output: sent.append(output))
    for step in range(c["steps"]):
        views = as_views(case, f"step{step}.im_q", f"step{step}.im_k")
        queue = model.queue.rows.clone()
        loss = model(views).loss
        keys = F.normalize(model.teach(views[:, 1:]), dim=1)
        got[f"step{step}.loss"] = loss
        got[f"step{step}.q_unnormalized"] = sent[-1]
        got[f"step{step}.logits"] = info_nce_logits(F.normalize(sent[-1], dim=1), keys, queue, config.temperature)
        record(step, "encoder_k", f"step{step}.encoder_k", model.state_dict())
        optimizer.zero_grad()
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        record(step, "encoder_q", f"grad.step{step}", gradients)
        optimizer.step()
        model.after_optimizer_step(0.0)
        record(step, "encoder_q", f"step{step}.encoder_q_after_sgd", model.state_dict())
        got[f"step{step}.queue"] = model.queue.rows.T.clone()
        got[f"step{step}.queue_ptr"] = model.queue.pointer.clone()[None]
    return got
