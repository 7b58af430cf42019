from typing import Any

from torch import Tensor

from hf_ssl.semi_supervised import interleave_order
from tests.contract.tiny import build
from tests.golden.harness import Case, gradients, runner


def losses(threshold: float, temperature: float, x: Tensor, labels: Tensor, weak: Tensor, strong: Tensor) -> Any:
    """Supervised and unlabelled loss, targets and weights, from the model's own functions."""
    model: Any = build("fixmatch", threshold=threshold, temperature=temperature)
    targets, weights = model.targets(weak)
    return model.supervised_loss(x, labels), model.unlabeled_loss(strong, targets, weights), targets, weights


@runner("fixmatch/loss")
def loss(case: Case) -> dict[str, Tensor]:
    """The peer sharpens its guesses with T before it compares them with the threshold. The official code and the paper
    compare the plain softmax, as ours does whatever its temperature: the peer's are our guesses from logits / T."""
    c = case.config
    x, strong = case.input("logits_x").requires_grad_(), case.input("logits_u_s").requires_grad_()
    weak = case.input("logits_u_w").requires_grad_()
    sharp = weak.detach() / c["T"]
    supervised, unlabeled, targets, weights = losses(c["threshold"], 0.0, x, case.input("targets_x"), sharp, strong)
    total = supervised + c["lambda_u"] * unlabeled
    grads = gradients(total, logits_x=x, logits_u_s=strong)
    return {
        "Lx": supervised, "Lu": unlabeled, "loss": total, "mask": weights, "pseudo_label": targets.argmax(-1),
        "interleave_order": interleave_order(c["B"] * (1 + 2 * c["mu"]), c["B"]),
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }  # fmt: skip


@runner("fixmatch/official_tf")
def official(case: Case) -> dict[str, Tensor]:
    c = case.config
    x, strong = case.input("logits_x").requires_grad_(), case.input("logits_strong").requires_grad_()
    supervised, unlabeled, _, weights = losses(
        c["confidence"], 0.0, x, case.input("labels"), case.input("logits_weak"), strong
    )
    grads = gradients(supervised + c["wu"] * unlabeled, logits_x=x, logits_strong=strong)
    return {
        "loss_xe": supervised, "loss_xeu": unlabeled, "mask": weights,
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }  # fmt: skip
