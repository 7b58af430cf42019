from torch import Tensor

from hf_ssl.losses import contrastive_logits, nt_xent
from tests.golden.harness import Case, gradients, runner


@runner("simclr/ntxent")
def ntxent(case: Case) -> dict[str, Tensor]:
    first, second = case.input("z0").requires_grad_(), case.input("z1").requires_grad_()
    loss, _ = nt_xent(first, second, case.config["temperature"])
    grads = gradients(loss, z0=first, z1=second)
    return {"ntxent.loss": loss, **{f"grad.ntxent.{name}": grad for name, grad in grads.items()}}


@runner("simclr/tf2")
def official(case: Case) -> dict[str, Tensor]:
    hidden = case.input("hidden").requires_grad_()
    first, second = hidden.chunk(2)
    setting = {"temperature": case.config["temperature"], "normalise": case.config.get("hidden_norm", True)}
    logits, _ = contrastive_logits(first, second, **setting)
    batch = len(first)
    loss = 2 * nt_xent(first, second, **setting)[0]  # the official code adds the two views' means
    return {"loss": loss, "logits_ab": logits[:batch, batch:], "grad.hidden": gradients(loss, hidden=hidden)["hidden"]}
