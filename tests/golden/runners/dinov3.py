from torch import Tensor

from hf_ssl.losses import dino_loss, gram_loss, koleo
from tests.golden.harness import Case, gradients, runner


@runner("dinov3/dino_loss")
def crops(case: Case) -> dict[str, Tensor]:
    logits = case.input("student_logits").requires_grad_()
    targets, got = case.input("teacher_probs").flatten(0, 1), {}
    for name, shared in (("all_pairs", False), ("ignore_diagonal", True)):
        loss = dino_loss(logits.flatten(0, 1), targets, logits.shape[1], case.config["student_temp"], shared)
        got |= {f"{name}.loss": loss, f"grad.{name}.student_logits": gradients(loss, x=logits)["x"]}
    return got


@runner("dinov3/gram")
def gram(case: Case) -> dict[str, Tensor]:
    target, output = case.input("target"), case.input("output").requires_grad_()
    whole = target.reshape(1, -1, target.shape[-1]), output.reshape(1, -1, output.shape[-1])  # no image boundaries
    losses = {
        "default": gram_loss(output, target, negatives="clip"),
        "keep_neg": gram_loss(output, target),
        "teacher_neg_only": gram_loss(output, target, negatives="clip_target"),
        "batch_level": gram_loss(whole[1], whole[0], negatives="clip"),
        "no_norm": gram_loss(output, target, normalise=False),
    }
    got = {f"{name}.loss": loss for name, loss in losses.items()}
    return got | {f"grad.{name}.output": gradients(loss, x=output)["x"] for name, loss in losses.items()}


@runner("dinov3/koleo_topk")
def spread(case: Case) -> dict[str, Tensor]:
    x, got = case.input("x").requires_grad_(), {}
    for neighbours in case.config["topks"]:
        loss = koleo(x, neighbours)
        got |= {f"top{neighbours}.loss": loss, f"grad.top{neighbours}.x": gradients(loss, x=x)["x"]}
    return got
